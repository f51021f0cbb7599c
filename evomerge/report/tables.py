"""What a command shows: tables and sentences for people, or the same as JSON or CSV for scripts.

Rows hold plain values under keys that stay: unrounded, in the user's own sign, None where there is none. A column says
how people read a row. ``search/NAME`` and its kin are named as in the frames of ``frames.py``.
"""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from evomerge.errors import InputError
from evomerge.report.console import console, say

if TYPE_CHECKING:
    from evomerge.evidence.functions import Estimate  # it would load numpy

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """How people read one thing of a row, under a heading; numbers stand to the right."""

    head: str
    text: Callable[[Row], str]
    is_number: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a command, or a step of one, shows.

    facts: what JSON says beside the tables. tables: rows by name; CSV is the first. people: tables and pictures, lines
    (text) that are never broken, and sentences (rich's ``Text``) that are.
    """

    people: Sequence[RenderableType]
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def showing(*, as_json: bool = False, as_csv: bool = False) -> Iterator[Callable[[Shown], None]]:
    """Give what shows a command's steps: to people one after the other, to scripts all in one when the block ends.

    For scripts, whatever else is printed within the block goes to stderr. What was shown before a failure is printed
    too. Raises: InputError for both forms.
    """
    if as_json and as_csv:
        raise InputError("--json and --csv: expected one of them; CSV is the first table of the JSON")
    if not (as_json or as_csv):
        yield show
        return
    steps: list[Shown] = []
    try:
        with redirect_stdout(sys.stderr):
            yield steps.append
    finally:
        if steps and as_json:
            answer: dict[str, Any] = {}
            for step in steps:
                answer |= {**step.facts, **step.tables}
            print(json.dumps(_plain(answer), indent=2))
        elif steps:
            _write_csv(next(iter(steps[0].tables.values())))


def show(shown: Shown) -> None:
    """Print for people."""
    for part in shown.people:
        if isinstance(part, str):
            say(part)
        else:
            console.print(part)


def make_table(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Row],
    *,
    faint: Callable[[Row], bool] = lambda _: False,
) -> Table:
    """Return rows as people read them; a rule parts the faint ones from those that follow."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            column.head,
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="ellipsis" if column.is_number else "fold",
        )
    before = False
    for row in rows:
        is_faint = faint(row)
        if before and not is_faint:
            table.add_section()
        table.add_row(*(column.text(row) for column in columns), style="dim" if is_faint else None)
        before = is_faint
    return table


def with_error(value: float | None, stderr: float | None) -> str:
    """A number with its standard error, which has no leading zero; nothing for none."""
    if value is None:
        return ""
    return f"{value:z.3f}" + ("" if stderr is None else f" ±{short(stderr)}")


def signed(value: float, stderr: float) -> str:
    """A difference with its standard error; what rounds to 0 has no minus sign."""
    return f"{value:+z.3f} ±{short(stderr)}"


def estimate_cells(name: str, estimate: "Estimate | None") -> dict[str, float | None]:
    """A number with its error and interval as cells of a row; None of none."""
    value, stderr, (low, high) = (
        (estimate.value, estimate.stderr, estimate.interval) if estimate else (None, None, (None, None))
    )
    return {name: value, f"{name}_stderr": stderr, f"{name}_low": low, f"{name}_high": high}


def estimated(estimate: "Estimate") -> str:
    """A number of any size with its standard error and interval."""
    low, high = estimate.interval
    return f"{estimate.value:.4g} ±{estimate.stderr:.2g} (95 % {low:.3g} to {high:.3g})"


def short(error: float) -> str:
    """An error below 1 without its leading zero."""
    return f"{error:.3f}".removeprefix("0")


def _write_csv(rows: Sequence[Row]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """A list or a mapping in a cell is JSON."""
    return json.dumps(_plain(value)) if isinstance(value, list | tuple | Mapping) else value


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: what is not finite is null, what is no plain value is its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
