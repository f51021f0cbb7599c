"""Many runs in one table."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from evomerge.ledger.location import Location
from evomerge.report.tables import Column, Shown, make_table
from evomerge.run.runs import RunSummary


def runs(summaries: Sequence[RunSummary], place: Location) -> Shown:
    """Return the runs of a place; those that cannot be read with the reason, below."""
    rows = [row_of(summary) for summary in summaries]
    columns = [
        Column("run", lambda row: row["name"] or row["location"], is_number=False),
        Column("campaign", lambda row: row["campaign"], is_number=False),
        Column("state", lambda row: row["state"] + (f" ({row['holder']})" if row["holder"] else ""), is_number=False),
        Column("trials", lambda row: f"{row['num_finished']} of {row['num_evaluations']}"),
        Column("front", lambda row: str(row["num_on_front"])),
        Column("best", lambda row: _number(row["best"])),
        Column("hypervolume", lambda row: _number(row["hypervolume"])),
        Column("last written", lambda row: local(row["written"])[:16], is_number=False),
    ]
    readable = [row for row in rows if row["problem"] is None]
    table = make_table(f"runs in {place}: the front by search items", columns, readable)
    return Shown(
        tables={"runs": rows},
        people=[
            *([] if summaries else [f"no runs in {place}; runs start with evomerge search"]),
            *([table] if readable else []),
            *(f"not read  {summary.problem}" for summary in summaries if summary.problem is not None),
        ],
    )


def row_of(summary: RunSummary) -> dict[str, Any]:
    """Return a run as a row; its time in ISO 8601."""
    return {
        "location": str(summary.location),
        "name": summary.location.name,
        "campaign": summary.name,
        "state": summary.state,
        "holder": summary.holder,
        "num_finished": summary.num_finished,
        "num_evaluations": summary.num_evaluations,
        "num_on_front": summary.num_on_front,
        "best": summary.best,
        "hypervolume": summary.hypervolume,
        "written": iso(summary.written),
        "problem": summary.problem,
    }


def iso(seconds: float | None) -> str | None:
    """Return Unix seconds in ISO 8601, UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def local(time: str | None) -> str:
    """Return an ISO time as the clock on the wall had it."""
    return "" if time is None else datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
