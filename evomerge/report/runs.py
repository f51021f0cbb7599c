"""Many runs in one table, for people and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime

from rich.box import SIMPLE_HEAD
from rich.table import Table

from evomerge.ledger.location import Location
from evomerge.report.terminal import console, say
from evomerge.runs import RunSummary


def print_runs(summaries: Sequence[RunSummary], place: Location) -> None:
    """Print the runs of a place; those that cannot be read with the reason, below."""
    readable = [summary for summary in summaries if summary.problem is None]
    if not summaries:
        say(f"no runs in {place}; runs start with evomerge search")
    if readable:
        table = Table(title=f"runs in {place}: the front by search items", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("run", "campaign", "state", "trials", "front", "best", "hypervolume", "last written"):
            is_text = column in ("run", "campaign", "state", "last written")
            table.add_column(column, justify="left" if is_text else "right", overflow="fold")
        for summary in readable:
            table.add_row(*_cells(summary))
        console.print(table)
    for summary in summaries:
        if summary.problem is not None:
            say(f"not read  {summary.problem}")


def runs_as_json(summaries: Sequence[RunSummary]) -> str:
    """Return the runs as a JSON list; times in ISO 8601."""
    rows = [{field.name: getattr(summary, field.name) for field in fields(summary)} for summary in summaries]
    for row in rows:
        row["location"] = str(row["location"])
        row["written"] = row["written"] and datetime.fromtimestamp(row["written"], UTC).isoformat(timespec="seconds")
    return json.dumps(rows, indent=2)


def _cells(summary: RunSummary) -> list[str]:
    location = summary.location
    assert summary.written is not None
    return [
        location.name or str(location),
        summary.name,
        f"{summary.state} ({summary.holder})" if summary.holder else summary.state,
        f"{summary.num_finished} of {summary.num_evaluations}",
        str(summary.num_on_front),
        "" if summary.best is None else f"{summary.best:.4g}",
        "" if summary.hypervolume is None else f"{summary.hypervolume:.4g}",
        datetime.fromtimestamp(summary.written).astimezone().strftime("%Y-%m-%d %H:%M"),
    ]
