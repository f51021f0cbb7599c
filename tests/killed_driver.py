"""Run as a script: drives a campaign to its end by one process after the other, each killed (SIGKILL) at a random moment.

The processes are forks of this one, which has imported everything and has the scorer that they use (it holds nothing
of a run's), so that dozens of them take seconds.
Arguments: a campaign as JSON, the run's folder, a seed. Prints how many were killed in each phase, as JSON.
"""

import json
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy import Engine, event

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Findings, make_plan
from evomerge.campaign.stages import make_stages
from evomerge.driver.watcher import Unwatched
from evomerge.ledger.database import IMMEDIATE
from evomerge.ledger.location import FILE_NAME
from evomerge.run.search import search
from evomerge.scorer import pools
from evomerge.scorer.scorer import Scorer
from evomerge.workers.inline import InlinePool

MOMENTS = ("begin", "before_cursor_execute", "after_cursor_execute", "commit")  # of a transaction that writes
SHARE_TIMED = 0.15  # of the processes; the others count moments
MOST_MOMENTS, MOST_SECONDS = 120, 0.3


class Telling(Unwatched):
    """Writes each phase to a pipe; the process kills itself after so many moments of the ledger's writing."""

    def __init__(self, pipe: int, num_moments: int | None) -> None:
        self._pipe = pipe
        if num_moments is not None:
            strike_at(num_moments)

    def phase(self, title: str, total: int, done: int) -> None:
        os.write(self._pipe, title[0].encode())


def strike_at(num_moments: int) -> None:
    moments = count(1)

    def strike(connection: Any, *_: Any) -> None:
        if connection.get_execution_options().get("begin") == IMMEDIATE and next(moments) == num_moments:
            os.kill(os.getpid(), signal.SIGKILL)

    for moment in MOMENTS:
        event.listen(Engine, moment, strike)


def attempt(campaign: Campaign, folder: Path, rng: np.random.Generator) -> tuple[bool, str]:
    """Drive the run in a process that is killed; return whether it ended before, and in which phase it was."""
    timed = rng.random() < SHARE_TIMED
    num_moments, seconds = int(rng.integers(1, MOST_MOMENTS)), float(rng.uniform(0, MOST_SECONDS))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            search(campaign, folder, watcher=Telling(writing, None if timed else num_moments))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if timed:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with open(reading, "rb") as pipe:
        phases = pipe.read().decode()
    assert status in (0, signal.SIGKILL), f"the driver failed: {status}"
    return status == 0, phases[-1:]


def recorded(folder: Path) -> set[tuple[Any, ...]]:
    """All that is recorded of trials: as they were issued, how they ended, what they and other models scored."""
    if not (folder / FILE_NAME).is_file():
        return set()
    with closing(sqlite3.connect(folder / FILE_NAME)) as ledger:
        if not ledger.execute("select 1 from sqlite_master where name = 'evomerge_trials'").fetchone():
            return set()
        issued = ledger.execute("select number, stage, stage_index, candidate, known from evomerge_trials")
        ended = ledger.execute(
            "select number, finish_order, fingerprint, failure from evomerge_trials where finish_order is not null"
        )
        scores = ledger.execute("select split, subject, objective, value, stderr, loss from evomerge_scores")
        return {("issued", *row) for row in issued} | {("ended", *row) for row in ended} | set(scores)


def main(campaign: Campaign, folder: Path, seed: int) -> Counter[str]:
    scorer = Scorer(make_plan(campaign))

    @contextmanager
    def open_pool(*_: Any) -> Iterator[tuple[InlinePool, Findings]]:
        yield InlinePool(scorer), scorer.findings

    pools.open_pool = open_pool  # type: ignore[assignment]
    rng, killed, held = np.random.default_rng(seed), Counter[str](), set[tuple[Any, ...]]()
    while True:
        has_ended, phase = attempt(campaign, folder, rng)
        before, held = held, recorded(folder)
        assert before <= held, f"lost: {before - held}"
        if has_ended:
            return killed
        killed[phase] += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sections = Path(sys.argv[1]).read_text(encoding="utf-8")
    given = Campaign.model_validate_json(sections, strict=False)
    make_stages(given, make_plan(given))  # imports what its proposers need
    print(json.dumps(main(given, Path(sys.argv[2]), int(sys.argv[3]))))
