"""What a large ledger costs: size, listing, opening, and a trial's two commits, in SQLite and PostgreSQL.

    make bench-ledger
    python benchmarks/ledger.py --trials 10000 --items 3000 --url postgresql://me@host/db

Writes a run of many trials, each with two objectives over the items together: an accuracy (0 or 1 an item) with the log
loss as its companion, as a classifier gives them; then reads it as the driver and its readers do. One row a database.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from evomerge.ledger.database import Database
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, locate
from evomerge.records import Candidate, Measurement, Score, Trial

NUM_DIMENSIONS = 32
NUM_MEASURED = 100  # trials whose commits are timed, at the end
COLUMNS = (
    "database",
    "size, MB",
    "a trial, ms",
    "open and list, s",
    "items, ms a trial",
    "all items, s",
    "resume, s",
)


def measurements(num_items: int) -> Iterator[Measurement]:
    """Yield what candidates score: each item has a difficulty, and each candidate a skill that drifts."""
    rng = np.random.default_rng(0)
    difficulty_N = rng.normal(size=num_items)
    halves = np.array_split(np.arange(num_items), 2)
    while True:
        logits_N = rng.normal(0.5, 0.3) - difficulty_N + rng.normal(0, 0.3, size=num_items)
        losses_N = np.log1p(np.exp(-3 * logits_N)).astype(np.float32)
        right_N = (logits_N > 0).astype(np.float32)
        scores = {
            name: Score(value=float(right_N[half].mean()), stderr=0.01, items=right_N[half], companion=losses_N[half])
            for name, half in zip(("math", "chat"), halves, strict=True)
        }
        yield Measurement(split="search", scores=scores, cost=1.0, seconds={"materialize": 0.1, "evaluate": 2.0})


def write(ledger: Ledger, num_trials: int, num_items: int) -> float:
    """Issue and record trials; return the milliseconds that one of the last took."""
    rng = np.random.default_rng(1)
    begun = 0.0
    for number, measurement in zip(range(num_trials), measurements(num_items), strict=False):
        if number == num_trials - NUM_MEASURED:
            begun = time.perf_counter()
        trial = ledger.issue(0, number, Candidate(point=tuple(rng.random(NUM_DIMENSIONS).tolist())))
        ledger.record(trial, measurement, "0123456789abcdef")
        if number % 1000 == 999:
            print(f"wrote {number + 1} trials", file=sys.stderr)
    return (time.perf_counter() - begun) / NUM_MEASURED * 1000


def seconds(work: Callable[[], Any]) -> float:
    """Return the least of three times."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def listed(location: Location) -> list[Trial]:
    """Open a run and list its trials."""
    with closing(Ledger.open(location)) as ledger:
        return ledger.trials()


def read_items(trials: list[Trial]) -> None:
    """Read what the items of trials score."""
    for trial in trials:
        assert trial.measurement is not None
        for score in trial.measurement.scores.values():
            assert len(score.items)


def resumed(location: Location) -> None:
    """Take the lease and read what a driver reads before it proposes."""
    with closing(Ledger.drive(location, "bench")) as ledger:
        ledger.measurements("search")
        ledger.trials()


def size_mb(location: Location) -> float:
    """Return the size of the database."""
    if location.url.get_backend_name() == "sqlite":
        return Path(str(location.url.database)).stat().st_size / 1e6
    with closing(Database(location)) as database, database.reading() as connection:
        return float(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()) / 1e6


def measure(location: Location, num_trials: int, num_items: int) -> list[str]:
    """Write a run at a location and return its row of the table."""
    with closing(Ledger.drive(location, "bench")) as ledger:
        ledger.begin({"name": "bench"}, {})
        a_trial = write(ledger, num_trials, num_items)
    list_s = seconds(lambda: listed(location))
    trials = listed(location)
    begun = time.perf_counter()
    read_items(trials)
    items_s = time.perf_counter() - begun
    return [
        location.url.get_backend_name(),
        f"{size_mb(location):.0f}",
        f"{a_trial:.1f}",
        f"{list_s:.2f}",
        f"{items_s / num_trials * 1000:.2f}",
        f"{items_s:.1f}",
        f"{seconds(lambda: resumed(location)):.2f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=3_000)
    parser.add_argument("--url", help="a PostgreSQL database, beside SQLite")
    given = parser.parse_args()
    table = Table(
        title=f"{given.trials:,} trials of {given.items:,} items, {NUM_DIMENSIONS} dimensions", box=SIMPLE_HEAD
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "database" else "right")
    with tempfile.TemporaryDirectory() as folder:
        places = [locate(Path(folder))]
        places += [locate(f"{given.url}#bench-{int(time.time())}")] if given.url else []
        for place in places:
            table.add_row(*measure(place, given.trials, given.items))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
