"""The terminal: lines within 100 columns, progress bars, and how the command is typed here."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)


def _command() -> str:
    """How the command is typed here: by its name, or by the path that was used where the name is not found."""
    typed = Path(sys.argv[0])
    return str(typed) if typed.name == "evomerge" and shutil.which("evomerge") is None else "evomerge"


COMMAND = _command()


def say(line: str) -> None:
    """Print a line that people copy from: never broken, however long its paths are."""
    console.print(line, soft_wrap=True)


def make_progress() -> Progress:
    """Return a progress bar with counts, time spent and time left.

    Beside what scripts read (stdout then leads to stderr) it is for eyes alone: where nobody watches, there is none.
    """
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=sys.stdout is sys.stderr and not console.is_terminal,
    )


class Loading:
    """A status line that says which checkpoint is being loaded, until something better is shown."""

    def __init__(self) -> None:
        self._status = console.status("loading")

    def __call__(self, name: str) -> None:
        """Say what is being loaded."""
        self._status.update(f"loading {name}")

    def __enter__(self) -> "Loading":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away."""
        self._status.stop()


def duration(seconds: float) -> str:
    """A time as people say it: 43 ms, 12 s, 3 min, 2.1 h."""
    if seconds < 10:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def some(names: Sequence[str]) -> str:
    """Name one or two of a kind, or the first and the last of more."""
    return ", ".join(names) if len(names) <= 2 else f"{names[0]}, ..., {names[-1]}"
