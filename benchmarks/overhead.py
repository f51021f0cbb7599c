"""What a candidate costs beyond its forward pass: proposing, materializing, driver and ledger.

    make bench-overhead

Prints, a proposer a row, medians over the candidates of one run in milliseconds: the whole time a candidate, the
forward (scoring all search items of four tasks), the materialization, and the rest (ask, issue, record, tell).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.driver.watcher import Unwatched
from evomerge.families.family import make
from evomerge.run.search import search

NUM_EVALUATIONS = 100
PROPOSERS = ("sobol", "cma_es", "tpe", "nsga2")


class Stopwatch(Unwatched):
    """Notes when each search trial finished."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.seconds: list[dict[str, float]] = []

    def advance(self, trial: object) -> None:
        """Note the time and the scorer's own seconds."""
        import time

        if trial is not None:
            self.times.append(time.perf_counter())
            self.seconds.append(dict(trial.measurement.seconds))  # type: ignore[attr-defined]


def main() -> None:
    """Run each proposer once and print the table."""
    family = make("digits4", Path(".cache/families/digits4"))
    table = Table(
        title=f"milliseconds a candidate, medians of {NUM_EVALUATIONS - 1}; digits4 per layer (32 dimensions)",
        box=SIMPLE_HEAD,
    )
    for column in ("proposer", "whole", "forward", "materialize", "propose + driver + ledger", "beyond the forward"):
        table.add_column(column, justify="left" if column == "proposer" else "right")
    for name in PROPOSERS:
        table.add_row(name, *(f"{value:.1f}" for value in _measure(family.campaign, name)))
        print(f"measured {name}", file=sys.stderr)
    Console(width=110).print(table)


def _measure(campaign_file: Path, proposer: str) -> tuple[float, ...]:
    sections = read_campaign(campaign_file).model_dump()
    sections |= {"search": [{"proposer": proposer}], "budget": {"evaluations": NUM_EVALUATIONS}}
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        search(Campaign.model_validate(sections), Path(folder) / "run", watcher=watch)
    whole = np.diff(watch.times) * 1000
    forward = np.array([seconds["evaluate"] for seconds in watch.seconds[1:]]) * 1000
    materialize = np.array([seconds["materialize"] for seconds in watch.seconds[1:]]) * 1000
    rest = whole - forward - materialize
    return tuple(float(np.median(part)) for part in (whole, forward, materialize, rest, materialize + rest))


if __name__ == "__main__":
    main()
