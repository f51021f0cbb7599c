"""How far one driver reaches: two real workers, a thousand simulated ones, a hundred thousand trials.

    make bench-scale
    python benchmarks/scale.py efficiency | throughput | trials [--trials 100000]

efficiency: candidates a second of a search on one and on two Ray workers, relative to one and to two independent
processes that score the same candidates with nothing between them, by turns on the same cores: of digits4 (.2 s an
evaluation) and of text (3 s), for what a driver takes a result is the same.

throughput: a whole search (driver, ledger on disk, log, progress bars; Sobol's points) over simulated workers, whose
evaluations take no time, and then 30 s on average. Their clock is the real one, except that it jumps to the next result
when the driver has nothing to do but wait: whatever the driver takes keeps workers waiting.

trials: the same with a long record: milliseconds a result at its beginning and end, memory, and the time to go on.
"""

import argparse
import heapq
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evomerge.campaign.campaign import BudgetSection, Campaign, StageSection, read_campaign
from evomerge.campaign.plan import Findings, Plan, make_plan
from evomerge.driver.watcher import Unwatched
from evomerge.families.family import make
from evomerge.ledger.location import locate
from evomerge.records import Candidate, Measurement, Recipe, Score, Split, TaskItems
from evomerge.report.console import Loading
from evomerge.report.progress import SearchProgress
from evomerge.run.run import open_run
from evomerge.run.search import search
from evomerge.run.times import times_of
from evomerge.scorer import pools
from evomerge.scorer.scorer import Scorer
from evomerge.workers.pool import Result, Subject
from evomerge.workers.ray_cluster import RayOptions

PARTS = ["efficiency", "throughput", "trials"]
NUM_SCORES = 64  # different measurements that simulated workers return
MEAN_S = 30.0
EVALUATIONS = {"digits4": 60, "text": 12}  # candidates a worker, of efficiency


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
        self._issued: list[tuple[float, float]] = []  # of searched candidates: when a worker got it, and its duration

    @property
    def now(self) -> float:
        """Seconds since the beginning, on the workers' clock."""
        return time.perf_counter() - self._begun + self._jumped - self.own_s

    @property
    def utilisation(self) -> float:
        """The busy share of all workers' time from the first candidate's issue to the last one's.

        What follows is the end of any search with a budget: workers go idle whose last candidate is done.
        """
        begun, ended = self._issued[0][0], self._issued[-1][0]
        busy = sum(min(duration, ended - at) for at, duration in self._issued)
        return busy / (self._num_workers * (ended - begun))

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
        if mean_s:
            self._issued.append((self.now, duration))
        heapq.heappush(self._running, (self.now + duration, key, split))

    def results(self) -> Iterator[Result]:
        """Yield what finishes next, once it has."""
        while self._running:
            begun = time.perf_counter()
            finished, key, split = heapq.heappop(self._running)
            self._jumped += max(finished - self.now, 0.0)
            outcome = self._scores[split][self._rng.integers(NUM_SCORES)]
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


def campaign_of(num_evaluations: int, family: str = "digits4") -> Campaign:
    """Return a family's campaign with a number of Sobol's points."""
    made = make(family, Path(".cache/families") / family)
    update = {"search": [StageSection(proposer="sobol")], "budget": BudgetSection(evaluations=num_evaluations)}
    return read_campaign(made.campaign).model_copy(update=update)


class Laps(SearchProgress):
    """The bars of a search; what they were told of each result, and when, is noted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(locate(folder), Loading())
        self.times: list[float] = []
        self.cpu: list[float] = []

    def advance(self, trial: Any) -> None:
        """Note the time, and what this process has computed by now."""
        super().advance(trial)
        if trial is not None:
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A search over simulated workers: the pool when its last result came, and what the driver took meanwhile."""

    pool: SimulatedPool
    laps: Laps
    now: float


def simulate(folder: Path, num_evaluations: int, num_workers: int, mean_s: float) -> Simulation:
    """Run a search, or go on with one, on simulated workers."""
    made: list[SimulatedPool] = []

    @contextmanager
    def open_simulated(campaign: Campaign, plan: Plan, notify: Callable[[str], None]) -> Iterator[Any]:  # noqa: ARG001
        made.append(SimulatedPool(plan, num_workers, mean_s))
        hashes = {place: f"hash of {place}" for place in (campaign.base, *campaign.experts.values())}
        yield made[0], Findings(hashes=hashes, items="simulated", sums={}, losses=frozenset())

    kept, pools.open_pool = pools.open_pool, open_simulated  # type: ignore[assignment]
    try:
        with Laps(folder) as laps:
            search(campaign_of(num_evaluations), folder, watcher=laps)
    finally:
        pools.open_pool = kept
    return Simulation(pool=made[0], laps=laps, now=made[0].now)


def throughput(num_workers: int = 1000) -> Table:
    """Return results a second of a driver whose workers answer at once, and how busy it keeps those that take 30 s."""
    table = Table(title=f"one driver, {num_workers:,} simulated workers", box=SIMPLE_HEAD)
    for column in ("an evaluation", "results", "ms a result", "of it computing", "results a second", "workers busy"):
        table.add_column(column, justify="right")
    for mean_s, num_evaluations in ((0.0, 5 * num_workers), (MEAN_S, 10 * num_workers)):
        with tempfile.TemporaryDirectory() as folder:
            simulation = simulate(Path(folder) / "run", num_evaluations, num_workers, mean_s)
        laps, pool = simulation.laps, simulation.pool
        count = len(laps.times) - 1
        wall_ms = (laps.times[-1] - laps.times[0] - pool.own_s) / count * 1000
        cpu_ms = (laps.cpu[-1] - laps.cpu[0] - pool.own_s) / count * 1000
        table.add_row(
            f"{mean_s:g} s",
            f"{count + 1:,}",
            f"{wall_ms:.2f}",
            f"{cpu_ms:.2f}",
            f"{1000 / wall_ms:.0f}",
            f"{pool.utilisation:.2%}" if mean_s else "",
        )
    return table


def long_record(num_trials: int, folder: Path) -> Table:
    """Return what a driver takes at the beginning and the end of a long record, and to go on with it."""
    before_mb = _memory_mb()
    laps = simulate(folder, num_trials, 1000, 0.0).laps
    with_mb, edge = _memory_mb(), max(1, num_trials // 20)
    table = Table(title=f"one driver, {num_trials:,} trials", box=SIMPLE_HEAD, show_header=False)
    for what, numbers in (("ms a result", laps.times), ("of it computing", laps.cpu)):
        first, last = (np.diff(part).mean() * 1000 for part in (numbers[: edge + 1], numbers[-edge - 1 :]))
        table.add_row(what, f"{first:.2f} in the first {edge:,}, {last:.2f} in the last")
    table.add_row("memory", f"{before_mb:.0f} MB before, {with_mb:.0f} MB after; at most {_peak_mb():.0f} MB")
    begun, cpu = time.perf_counter(), time.process_time()
    going_on = simulate(folder, num_trials + 10, 1000, 0.0).laps.times[0] - begun
    table.add_row(
        "going on", f"{going_on:.1f} s to the first result, {time.process_time() - cpu:.1f} s computing in all"
    )
    table.add_row("record", f"{(folder / 'ledger.sqlite').stat().st_size / 1e6:.0f} MB")
    return table


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


class UntilTested(Unwatched):
    """Ends a run once its candidates are scored: the test items take long, and are no part of the search."""

    def phase(self, title: str, total: int, done: int) -> None:
        """Stop before the last one."""
        del total, done
        if title == "test items":
            raise KeyboardInterrupt


def efficiency(family: str, rounds: int) -> Table:
    """Return candidates a second of Ray workers relative to independent processes, by turns on the same machine."""
    num_evaluations = EVALUATIONS[family]
    table = Table(title=f"{family}, {num_evaluations} candidates a worker, {rounds} rounds by turns", box=SIMPLE_HEAD)
    for column in ("workers", "independent processes, a second", "Ray workers, a second", "relative", "workers busy"):
        table.add_column(column, justify="right")
    for count in (1, 2):
        alone, pooled, busy = [], [], []
        for number in range(rounds):
            print(f"{family}, {count} workers, round {number + 1} of {rounds}", file=sys.stderr)
            alone.append(_independent(family, count))
            speed, utilisation = _on_ray(family, count)
            pooled.append(speed)
            busy.append(utilisation)
        relative = [mine / theirs for mine, theirs in zip(pooled, alone, strict=True)]
        table.add_row(
            str(count),
            " ".join(f"{speed:.2f}" for speed in alone),
            " ".join(f"{speed:.2f}" for speed in pooled),
            " ".join(f"{ratio:.3f}" for ratio in relative) + f"; median {np.median(relative):.3f}",
            " ".join(f"{share:.1%}" for share in busy),
        )
    return table


def _independent(family: str, count: int) -> float:
    """Return candidates a second of processes that share nothing; the clock starts when all are ready."""
    num_evaluations = EVALUATIONS[family]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count + 1)
    processes = [context.Process(target=_score_alone, args=(barrier, n, family)) for n in range(count)]
    for process in processes:
        process.start()
    barrier.wait()
    begun = time.perf_counter()
    barrier.wait()
    spent = time.perf_counter() - begun
    for process in processes:
        process.join()
    return count * num_evaluations / spent


def _score_alone(barrier: Any, number: int, family: str) -> None:
    import torch

    torch.set_num_threads(1)
    num_evaluations = EVALUATIONS[family]
    scorer = Scorer(make_plan(campaign_of(num_evaluations, family)))
    points = np.random.default_rng(number).random((num_evaluations + 1, len(scorer.plan.space)))
    scorer.score(Candidate(point=tuple(points[-1].tolist())), "search")
    barrier.wait()
    for point in points[:-1]:
        scorer.score(Candidate(point=tuple(point.tolist())), "search")
    barrier.wait()


def _on_ray(family: str, count: int) -> tuple[float, float]:
    """Return candidates a second of a search on Ray workers, and their busy share, by its own record."""
    num_evaluations = count * EVALUATIONS[family]
    campaign = campaign_of(num_evaluations, family).model_copy(
        update={"workers": RayOptions(kind="ray", address="local", count=count)}
    )
    with tempfile.TemporaryDirectory() as folder:
        with suppress(KeyboardInterrupt):
            search(campaign, Path(folder) / "run", watcher=UntilTested())
        times = times_of(open_run(Path(folder) / "run").trials)
    return num_evaluations / times.search_s, times.utilisation


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="efficiency, throughput, trials (default: all)")
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    wanted = given.what or PARTS
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    console = Console(width=110)
    if "efficiency" in wanted:
        for family in EVALUATIONS:
            console.print(efficiency(family, given.rounds))
    if "throughput" in wanted:
        console.print(throughput())
    if "trials" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            console.print(long_record(given.trials, Path(folder) / "run"))


if __name__ == "__main__":
    main()
