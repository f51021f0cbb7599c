"""What a person sees of searches that run on a cluster: what was submitted, what became of it, what to type next."""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.box import SIMPLE_HEAD
from rich.table import Table

from evomerge.report.console import COMMAND
from evomerge.report.runs import iso
from evomerge.report.tables import Row, Shown
from evomerge.submit import DRAIN_S, Submitted
from evomerge.workers.jobs import Job


def submitted(found: Submitted, option: str) -> Shown:
    """Return what was submitted where; option: how the commands to come name the server."""
    job, run = found.job, found.run
    return Shown(
        facts={"job": job, "server": found.server, "run": run},
        people=[
            f"job      {job}  (on {found.server})",
            f"run      {run}  (as the cluster's head node sees it)",
            *_next(f"job logs {job} --follow{option}", f"job stop {job}{option}", f"front {run.quoted}"),
        ],
    )


def all_jobs(jobs: Sequence[Job], server: str) -> Shown:
    """Return the searches that were submitted to a cluster."""
    table = Table(title=f"searches submitted to {server}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("job", "state", "submitted", "took", "run"):
        table.add_column(column, justify="right" if column == "took" else "left", overflow="fold")
    for job in jobs:
        table.add_row(job.name, job.state, _clock(job), _took(job), job.run)
    none = f"nothing was submitted to {server}; searches are submitted with {COMMAND} submit"
    rows = [_row(job) for job in jobs]
    return Shown(facts={"server": server}, tables={"jobs": rows}, people=[table if jobs else none])


def one_job(job: Job, server: str, option: str) -> Shown:
    """Return what became of one job; option: how the commands to come name the server."""
    logs = f"job logs {job.name}{option}"
    people = [
        f"job      {job.name}: {job.state}, submitted {_clock(job)}, {'took' if job.is_over else 'for'} {_took(job)}",
        f"run      {job.run}",
        *([f"problem  {job.problem}"] if job.problem else []),
        *_next(*([logs] if job.is_over else [f"{logs} --follow", f"job stop {job.name}{option}"])),
    ]
    return Shown(facts={"server": server}, tables={"jobs": [_row(job)]}, people=people)


def stopping(before: Job, option: str) -> Shown:
    """Return what becomes of a job that was asked to stop."""
    if before.is_over:
        return Shown(people=[f"job      {before.name} was over: {before.state}"])
    limit = timedelta(seconds=DRAIN_S)
    people = [
        f"job      {before.name} stops when what is under way has finished, or after {limit}; nothing recorded is lost",
        *_next(f"job status {before.name}{option}"),
        f"         {COMMAND} submit, as before, goes on where it ended",
    ]
    return Shown(people=people)


def _next(*commands: str) -> list[str]:
    return [f"{'next' if number == 0 else '':8} {COMMAND} {command}" for number, command in enumerate(commands)]


def _row(job: Job) -> Row:
    return {
        "job": job.name,
        "state": job.state,
        "is_over": job.is_over,
        "submitted": iso(job.started),
        "seconds": _seconds(job),
        "run": job.run,
        "problem": job.problem or None,
    }


def _clock(job: Job) -> str:
    return datetime.fromtimestamp(job.started or time.time()).astimezone().strftime("%Y-%m-%d %H:%M")


def _took(job: Job) -> str:
    return str(timedelta(seconds=round(_seconds(job))))


def _seconds(job: Job) -> float:
    """How long a job took, or has taken by now."""
    now = time.time()
    return (job.ended or now) - (job.started or now)
