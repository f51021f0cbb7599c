"""What runs now: how far it is, what it has found, how long it takes, what went wrong, what happened last."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from evomerge.records import Trial
from evomerge.report.console import COMMAND, duration
from evomerge.report.runs import iso, row_of
from evomerge.report.tables import Column, Row, Shown, estimate_cells, estimated, make_table
from evomerge.run.status import RunStatus

MAX_REASON = 70  # characters of a failure's reason


def status(found: Sequence[RunStatus]) -> Shown:
    """Return the status of some runs, one below the other."""
    rows = [_row(of_run) for of_run in found]
    people: list[RenderableType] = []
    for of_run, row in zip(found, rows, strict=True):
        people += [*([""] if people else []), *_lines(of_run, row)]
    return Shown(tables={"runs": rows}, people=people)


def _row(of_run: RunStatus) -> dict[str, Any]:
    return {
        **row_of(of_run.summary),
        **estimate_cells("hypervolume", of_run.volume),
        "begun": iso(of_run.begun),
        "stage": of_run.stage,
        "counts": of_run.counts,
        "best_by_objective": of_run.best,
        "cost": of_run.run.cost,
        "results_per_second": of_run.rate,
        "seconds_left": of_run.seconds_left,
        "failures": of_run.failure_reasons,
        "latest": [_result(of_run, trial) for trial in of_run.latest],
    }


def _result(of_run: RunStatus, trial: Trial) -> dict[str, Any]:
    measurement, issued, finished = trial.measurement, of_run.issued_at(trial), of_run.finished_at(trial)
    steering = of_run.run.steering
    return {
        "trial": trial.number,
        "stage": trial.stage,
        "state": trial.state,
        "finished": iso(finished),
        "seconds": None if issued is None or finished is None else finished - issued,
        "on_front": trial in of_run.run.front,
        "values": {o.name: measurement.scores[o.name].value for o in steering} if measurement else {},
        "failure": trial.failure,
    }


def _lines(of_run: RunStatus, row: Row) -> list[RenderableType]:
    run, summary = of_run.run, of_run.summary
    held = f", driven by {summary.holder}" if summary.holder else ""
    lines: list[RenderableType] = [
        f"run      {run.location}  ({summary.name}): {summary.state}{held}",
        f"trials   {_progress(of_run)}",
    ]
    if not of_run.best:
        lines.append("found    no trial has been scored yet")
    else:
        best = ", ".join(f"{name} {value:.4g}" for name, value in of_run.best.items())
        front = f"; {summary.num_on_front} models on the front" if len(run.steering) > 1 else ""
        volume = "" if of_run.volume is None else f", hypervolume {estimated(of_run.volume)} above the base"
        lines.append(Text(f"found    best {best}{front}{volume} (search items)"))
    lines.append(f"time     {_timing(of_run)}")
    for number, (reason, count) in enumerate(of_run.failure_reasons.items()):
        shown = reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 3] + "..."
        lines.append(("failed   " if number == 0 else "         ") + f"{count} x {shown}")
    if of_run.latest:
        lines.append(make_table("", _columns(of_run), row["latest"]))
    command = "front" if of_run.best else "status"
    return [*lines, f"next     {COMMAND} {command} {run.location.quoted}"]


def _progress(of_run: RunStatus) -> str:
    counts, budget = of_run.counts, of_run.summary.num_evaluations
    if not of_run.run.trials:
        return f"none yet of {budget}: the reference models come first"
    shown = [f"{count} {state}" for state, count in counts.items() if count]
    share = of_run.summary.num_finished / budget
    stages = f", in stage {of_run.stage + 1}" if of_run.stage else ""
    return f"{of_run.summary.num_finished} of {budget} ({share:.0%}): {', '.join(shown)}{stages}"


def _timing(of_run: RunStatus) -> str:
    written = of_run.summary.written
    since = "" if written is None else f"last written {duration(max(0.0, of_run.now - written))} ago"
    if of_run.rate is None or of_run.seconds_left is None:
        return since
    per = f"{of_run.rate:.3g} a second" if of_run.rate >= 1 else f"{of_run.rate * 60:.3g} a minute"
    return f"{per}, about {duration(of_run.seconds_left)} left for the search; {since}"


def _columns(of_run: RunStatus) -> list[Column]:
    def outcome(row: Row) -> str:
        if row["failure"]:
            return str(row["failure"])[:MAX_REASON]
        values = ", ".join(f"{name} {value:.3f}" for name, value in row["values"].items())
        return values + (" (stopped early)" if row["state"] == "stopped" else " ●" if row["on_front"] else "")

    return [
        Column("trial", lambda row: str(row["trial"])),
        Column("finished", lambda row: _clock(of_run.finished_at(of_run.run.trials[row["trial"]])), is_number=False),
        Column("took", lambda row: "" if row["seconds"] is None else duration(row["seconds"])),
        Column("what came of it (● on the front)", outcome, is_number=False),
    ]


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%H:%M:%S", time.localtime(seconds))
