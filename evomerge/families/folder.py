"""The folder of a family: is it the one asked for, and making it appear whole or not at all."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.families.recipes import library_versions

STALE_AFTER_S = 6 * 3600.0  # a build takes minutes: a temporary folder this old belongs to one that was killed


def is_occupied(out: Path) -> bool:
    """Return whether ``out`` is anything but a free path or an empty folder."""
    return any(out.iterdir()) if out.is_dir() else out.exists()


def finished_description(out: Path, name: str, identity: str) -> dict[str, Any]:
    """Return the family.json of ``out`` if that is the family asked for and complete.

    Raises: InputError that says what ``out`` holds instead.
    """
    expected = f"{out}: expected a free path, an empty folder or the finished family {name!r}"
    advice = "remove it or choose another folder"
    try:
        description: dict[str, Any] = json.loads((out / "family.json").read_text(encoding="utf-8"))
        found_name, found_hash, files = description["name"], description["hash"], description["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{expected}, found something else; {advice}") from None
    if found_name != name:
        raise InputError(f"{expected}, found the family {found_name!r}; {advice}")
    if found_hash != identity:
        raise InputError(f"{expected}, found {name!r} built with {_difference(description)}; {advice}")
    missing = [file for file in files if not (out / file).is_file()]
    if missing:
        raise InputError(f"{expected}, found {name!r} without its file {missing[0]}; remove it and make it again")
    return description


def _difference(description: dict[str, Any]) -> str:
    built_with = description.get("libraries", {})
    changed = [library for library, current in library_versions().items() if built_with.get(library) != current]
    return f"other versions of {', '.join(changed)}" if changed else "another recipe"


@contextmanager
def temporary_sibling(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``, on the same file system, that is removed if it was not moved away."""
    prefix = f".{out.name}.building-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{prefix}*"):
        if time.time() - leftover.stat().st_mtime > STALE_AFTER_S:
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes private folders, this one is to stay
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``, which is free or an empty folder.

    If another build of the same family got there first, its result stays and this one is dropped: they are equal.
    """
    try:
        if out.is_dir():
            out.rmdir()
        os.rename(folder, out)
    except OSError:
        if not (out / "family.json").is_file():
            raise
