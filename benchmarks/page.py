"""The page of large runs: size of the report, time to make it, and time until its first pictures can be used.

    make bench-page
    python -m benchmarks.page --trials 60 1000 10000

Writes made-up runs of four experts, 32 coefficients and as many objectives as experts through the real ledger, writes
their reports, and opens each three times in headless Chromium; the least time counts, from opening the file.
"""

import argparse
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evomerge.campaign.campaign import Campaign
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, locate
from evomerge.records import Candidate, Floats, Measurement, Objective, Score, Split
from evomerge.report.html import write_report
from evomerge.run.run import open_run
from evomerge.space.space import Dimension

EXPERTS = ("maths", "chat", "code", "law")
GROUPS = ("before", *(f"layer{number}" for number in range(6)), "after")
NUM_ITEMS = 300  # of each objective and split
CHROMIUM = "/usr/bin/chromium"
COLUMNS = ("trials", "on the front", "report, MB", "to make it, s", "to interactive, s", "CPU-s of it")


class World:
    """What made-up models score: an expert's coefficients help its own objective, and harm most of the others."""

    def __init__(self, objectives: tuple[str, ...], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.objectives = tuple(
            Objective(name=name, task=name, metric="accuracy", direction="max") for name in objectives
        )
        self._pull_MD = rng.normal(-0.12, 0.06, (len(objectives), len(EXPERTS), len(GROUPS)))
        for m in range(len(objectives)):
            self._pull_MD[m, m % len(EXPERTS)] = rng.uniform(0.2, 0.6, len(GROUPS))
        self._difficulty_N = rng.normal(size=NUM_ITEMS)
        self._rng = rng

    def measure(self, point_D: Floats, split: Split, stopped: str | None = None) -> Measurement:
        """Score a point."""
        scores = {}
        for objective, pull_EG in zip(self.objectives, self._pull_MD, strict=True):
            skill = float((pull_EG.ravel() * point_D).sum() - 0.02 * ((point_D - 0.6) ** 2).sum())
            noise_N = self._rng.normal(0, 0.5, NUM_ITEMS)
            right_N = (skill - self._difficulty_N + noise_N > 0).astype(np.float32)
            value = float(right_N.mean())
            stderr = max((value * (1 - value) / NUM_ITEMS) ** 0.5, 1e-3)
            scores[objective.name] = Score(value=value, stderr=stderr, items=right_N)
        seconds = {"evaluate": 2.0 + float(self._rng.random()), "materialize": 0.1}
        return Measurement(split=split, scores=scores, cost=1.0, seconds=seconds, stopped=stopped)


def write_run(
    location: Location, num_trials: int, objectives: tuple[str, ...] = EXPERTS, experts: tuple[str, ...] = EXPERTS
) -> None:
    """Write a finished run; every 50th trial fails, every 40th is stopped early, and the last one waits."""
    world, rng = World(objectives), np.random.default_rng(1)
    campaign = Campaign.model_validate(
        {
            "name": "made-up",
            "base": "base",
            "experts": {expert: expert for expert in experts},
            "objectives": [{"name": o.name, "task": o.task, "metric": o.metric} for o in world.objectives],
            "evaluation": {"kind": "classification", "data": "data", "split": {"adapt": 0, "search": 0.5, "test": 0.5}},
            "fidelity": {},
            "budget": {"evaluations": num_trials},
        }
    )
    with closing(Ledger.drive(location, campaign.name)) as ledger:
        ledger.begin(campaign.model_dump(mode="json"), _facts(world))
        for name, point_D in _references().items():
            ledger.measure(name, world.measure(point_D, "search"))
        points_ND = rng.beta(0.6, 0.9, (num_trials, len(EXPERTS) * len(GROUPS)))
        for number, point_D in enumerate(points_ND):
            trial = ledger.issue(0, number, Candidate(point=tuple(point_D.tolist())))
            if number == num_trials - 1:
                break
            if number % 50 == 49:
                ledger.record(
                    trial, "evaluation failed: out of memory" if number % 100 == 49 else "a loss was NaN", None
                )
                continue
            stopped = "a race was lost" if number % 40 == 39 else None
            fate = {"worker": f"node{number % 3}"}
            ledger.record(trial, world.measure(point_D, "search", stopped), "0123456789abcdef", fate)
        points = {f"trial:{trial.number}": np.array(trial.point) for trial in open_run(location).front}
        ledger.touch_test_items()
        tested = {name: point for name, point in _references().items() if not name.startswith("scalar:")}
        for name, point_D in {**tested, "scalar:0.4": np.full(len(points_ND[0]), 0.43), **points}.items():
            ledger.measure(name, world.measure(point_D, "test"))
        ledger.finish(num_trials)


def _facts(world: World) -> dict[str, object]:
    space = [
        asdict(Dimension(parameter="coefficient", expert=expert, group=group, low=-0.2, high=1.2, start=0.3))
        for expert in EXPERTS
        for group in GROUPS
    ]
    sources = {objective.name: list(range(NUM_ITEMS)) for objective in world.objectives}
    return {
        "objectives": [asdict(objective) for objective in world.objectives],
        "hashes": {},
        "decisions": [],
        "items": "none",
        "sources": {"search": sources, "test": sources},
        "stages": [{"changes": {}, "left_out": [], "ancestor": None, "space": space, "kept": []}],
    }


def _references() -> dict[str, Floats]:
    points = {"base": np.full((len(EXPERTS), len(GROUPS)), 1 / 7)}  # where coefficients are 0
    for k, expert in enumerate(EXPERTS):
        points[f"expert:{expert}"] = points["base"].copy()
        points[f"expert:{expert}"][k] = 6 / 7
    points["uniform"] = np.full((len(EXPERTS), len(GROUPS)), 0.32)
    points["scalar:0.4"] = np.full((len(EXPERTS), len(GROUPS)), 0.43)
    return {name: point.ravel() for name, point in points.items()}


def seconds_to_interactive(report: Path) -> tuple[float, float]:
    """Return how long a browser takes until the first pictures of a report are drawn, and its thread's processor time.

    The least of three each. The processor time includes what follows at once: reading and showing the intervals.
    """
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(report.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            metrics = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
            interactive_ms = page.evaluate("performance.getEntriesByName('interactive')[0].startTime")
            found.append((interactive_ms / 1000, metrics["ThreadTime"]))
            page.close()
        browser.close()
    return min(wall_s for wall_s, _ in found), min(cpu_s for _, cpu_s in found)


def measure(folder: Path, num_trials: int) -> list[str]:
    """Write a run and its report, and return its row of the table."""
    location = locate(folder)
    write_run(location, num_trials)
    report = folder / "report.html"
    run = open_run(location)
    begun = time.perf_counter()
    write_report(run, report)
    made_s = time.perf_counter() - begun
    wall_s, cpu_s = seconds_to_interactive(report)
    size_mb = report.stat().st_size / 1e6
    return [
        f"{num_trials:,}",
        f"{len(run.front):,}",
        f"{size_mb:.2f}",
        f"{made_s:.1f}",
        f"{wall_s:.2f}",
        f"{cpu_s:.2f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[60, 1000, 10_000])
    given = parser.parse_args()
    table = Table(title="reports of made-up runs", box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for num_trials in given.trials:
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(*measure(Path(folder), num_trials))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
