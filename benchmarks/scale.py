"""How far one driver reaches: two real workers, a thousand simulated ones, a hundred thousand trials.

    make bench-scale
    python benchmarks/scale.py efficiency | throughput | trials [--trials 100000]

efficiency: candidates a second of a search on one and on two Ray workers, relative to one and to two independent
processes that score the same candidates with nothing between them, at the same time on the same cores.

throughput: a whole search (driver, ledger on disk, log, progress bars; Sobol's points) over simulated workers, whose
evaluations take no time, and then 30 s on average. Their clock is the real one, except that it jumps to the next result
when the driver has nothing to do but wait: whatever the driver takes keeps workers waiting.

trials: the same with a long record: milliseconds a result at its beginning and end, memory, and the time to go on.
"""

import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from evomerge import pools
from evomerge.campaign import BudgetSection, Campaign, StageSection, read_campaign
from evomerge.families.family import make
from evomerge.ledger.location import locate
from evomerge.plan import Findings, Plan
from evomerge.records import Measurement, Recipe, Score, Split, TaskItems
from evomerge.report.terminal import Loading, SearchProgress
from evomerge.run import search
from evomerge.workers.pool import Result, Subject

NUM_SCORES = 64  # different measurements that simulated workers return
MEAN_S = 30.0


class SimulatedPool:
    """Workers that return made-up measurements after random times; ``mean_s`` 0 is at once.

    Durations are uniform within half of the mean up and down. now: the real time, plus what was jumped over.
    """

    def __init__(self, plan: Plan, num_workers: int, mean_s: float) -> None:
        self._num_workers, self._mean_s = num_workers, mean_s
        self._rng = np.random.default_rng(0)
        self._scores = {split: _measurements(plan, split) for split in ("search", "test")}
        self._running: list[tuple[float, int, Split]] = []
        self._jumped = 0.0
        self._begun = time.perf_counter()
        self.own_s = 0.0  # what the simulation itself took: no work of the driver's
        self.busy_s, self.num_results = 0.0, 0

    @property
    def now(self) -> float:
        """Seconds since the beginning, on the workers' clock."""
        return time.perf_counter() - self._begun + self._jumped - self.own_s

    @property
    def num_free(self) -> int:
        """Workers that have nothing to do."""
        return self._num_workers - len(self._running)

    def configure(self, stage_space: Any) -> None:
        """Points are not looked at."""

    def submit(self, key: int, subject: Subject, split: Split, items: TaskItems | None = None) -> None:  # noqa: ARG002
        """Give a candidate to a worker; references take no time."""
        mean_s = 0.0 if isinstance(subject, Recipe) else self._mean_s
        duration = mean_s * self._rng.uniform(0.5, 1.5)
        self.busy_s += duration
        heapq.heappush(self._running, (self.now + duration, key, split))

    def results(self) -> Iterator[Result]:
        """Yield what finishes next, once it has."""
        while self._running:
            begun = time.perf_counter()
            finished, key, split = heapq.heappop(self._running)
            self._jumped += max(finished - self.now, 0.0)
            outcome = self._scores[split][self._rng.integers(NUM_SCORES)]
            self.num_results += 1
            fate = {"worker": f"10.0.0.{key % 250} pid {key % 1000}", "attempts": 1}
            fate |= {"queue_s": 0.001, "busy_s": self._mean_s, "idle_s": 0.01}
            self.own_s += time.perf_counter() - begun
            yield Result(key, outcome, fate)


def _measurements(plan: Plan, split: Split) -> list[Measurement]:
    """Return what candidates score: right or wrong an item, and its log loss."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(NUM_SCORES):
        scores = {}
        for objective in plan.objectives:
            logits_N = rng.normal(rng.normal(0.5, 0.3), 1.0, size=len(plan.splits[objective.task][split]))
            right_N, losses_N = (logits_N > 0).astype(np.float32), np.log1p(np.exp(-3 * logits_N)).astype(np.float32)
            value = float(right_N.mean())
            scores[objective.name] = Score(value=value, stderr=0.01, items=right_N, companion=losses_N)
        seconds = {"materialize": 0.1, "evaluate": 2.0}
        made.append(Measurement(split=split, scores=scores, cost=1.0, seconds=seconds))
    return made


def campaign_of(num_evaluations: int, proposer: str = "sobol") -> Campaign:
    """Return the campaign of digits4 with a number of evaluations."""
    family = make("digits4", Path(".cache/families/digits4"))
    update = {"search": [StageSection(proposer=proposer)], "budget": BudgetSection(evaluations=num_evaluations)}
    return read_campaign(family.campaign).model_copy(update=update)


class Laps(SearchProgress):
    """The bars of a search, noting when each result was taken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(locate(folder), Loading())
        self.times: list[float] = []

    def advance(self, trial: Any) -> None:
        """Note the time."""
        super().advance(trial)
        if trial is not None:
            self.times.append(time.perf_counter())


def simulate(folder: Path, num_evaluations: int, num_workers: int, mean_s: float) -> tuple[SimulatedPool, Laps, float]:
    """Run a search on simulated workers; return them, the watcher, and the seconds of the workers' clock it took."""
    made: list[SimulatedPool] = []

    @contextmanager
    def open_simulated(campaign: Campaign, plan: Plan, notify: Callable[[str], None]) -> Iterator[Any]:  # noqa: ARG001
        made.append(SimulatedPool(plan, num_workers, mean_s))
        hashes = {place: f"hash of {place}" for place in (campaign.base, *campaign.experts.values())}
        yield made[0], Findings(hashes=hashes, items="simulated", sums=None, losses=frozenset())

    pools.open_pool, kept = open_simulated, pools.open_pool
    try:
        with Laps(folder) as laps:
            search(campaign_of(num_evaluations), folder, watcher=laps)
    finally:
        pools.open_pool = kept
    return made[0], laps, made[0].now
