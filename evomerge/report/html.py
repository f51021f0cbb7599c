"""A run as one HTML file that works offline: the page of ``evomerge ui`` with its data inside."""

from collections.abc import Callable
from pathlib import Path

from evomerge.report.page.document import one_document
from evomerge.report.page.parts import PARTS, part_json
from evomerge.run.run import Run

ITEM_BYTES = 900_000  # a report of 10,000 trials shall stay below 8 MB, of which Plotly is 4.8


def write_report(run: Run, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write the report. say: is told which part is being made.

    The log stays beside the run: it names machines and processes, and reports are handed on.
    """
    parts = {"log": "[]"}
    for name in PARTS:
        if name not in parts:
            say(name)
            parts[name] = part_json(run, name, item_bytes=ITEM_BYTES)
    path.write_text(one_document(parts), encoding="utf-8")
