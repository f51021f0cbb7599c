"""What a person sees of searches that run on a cluster: what was submitted, what became of it, what to type next."""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.box import SIMPLE_HEAD
from rich.table import Table

from evomerge.report.console import COMMAND, console, say
from evomerge.submit import DRAIN_S, Submitted
from evomerge.workers.jobs import Job


def print_submitted(submitted: Submitted, option: str) -> None:
    """Say what was submitted where; option: how the commands to come name the server."""
    job, run = submitted.job, submitted.run
    say(f"job      {job}  (on {submitted.server})")
    say(f"run      {run}  (as the cluster's head node sees it)")
    _print_next(f"job logs {job} --follow{option}", f"job stop {job}{option}", f"front {run.quoted}")


def print_jobs(jobs: Sequence[Job], server: str) -> None:
    """Print the searches that were submitted to a cluster."""
    if not jobs:
        say(f"nothing was submitted to {server}; searches are submitted with {COMMAND} submit")
        return
    table = Table(title=f"searches submitted to {server}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("job", "state", "submitted", "took", "run"):
        table.add_column(column, justify="right" if column == "took" else "left", overflow="fold")
    for job in jobs:
        table.add_row(job.name, job.state, _clock(job), _took(job), job.run)
    console.print(table)


def print_job(job: Job, option: str) -> None:
    """Print what became of one job; option: how the commands to come name the server."""
    say(f"job      {job.name}: {job.state}, submitted {_clock(job)}, {'took' if job.is_over else 'for'} {_took(job)}")
    say(f"run      {job.run}")
    if job.problem:
        say(f"problem  {job.problem}")
    logs = f"job logs {job.name}{option}"
    _print_next(*([logs] if job.is_over else [f"{logs} --follow", f"job stop {job.name}{option}"]))


def print_stopping(before: Job, option: str) -> None:
    """Say what becomes of a job that was asked to stop."""
    if before.is_over:
        say(f"job      {before.name} was over: {before.state}")
        return
    limit = timedelta(seconds=DRAIN_S)
    say(f"job      {before.name} stops when what is under way has finished, or after {limit}; nothing recorded is lost")
    _print_next(f"job status {before.name}{option}")
    say(f"         {COMMAND} submit, as before, goes on where it ended")


def _print_next(*commands: str) -> None:
    for number, command in enumerate(commands):
        say(f"{'next' if number == 0 else '':8} {COMMAND} {command}")


def _clock(job: Job) -> str:
    return datetime.fromtimestamp(job.started or time.time()).astimezone().strftime("%Y-%m-%d %H:%M")


def _took(job: Job) -> str:
    now = time.time()
    return str(timedelta(seconds=round((job.ended or now) - (job.started or now))))
