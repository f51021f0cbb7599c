"""Run as a script: drives the run at a location until it is killed, or reads it until all is there."""

import sys
import time
from itertools import count

import numpy as np

from evomerge.errors import EvoMergeError
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, locate
from evomerge.records import Candidate, Measurement, Score, Split


def measured(value: float = 0.5, *, num_items: int = 3, split: Split = "search") -> Measurement:
    score = Score(value=value, stderr=0.1, items=np.full(num_items, value, dtype=np.float32))
    return Measurement(split=split, scores={"math": score, "chat": score}, cost=1.0, seconds={"evaluate": 0.25})


def candidate(*point: float) -> Candidate:
    return Candidate(point=point or (0.5,))


def write(location: Location, pause: int = -1) -> None:
    """Issue and record without end; print each number after its record has returned, and wait for a word after one."""
    ledger = Ledger.drive(location, "one")
    start = len(ledger.trials())
    for number in count(start):
        trial = ledger.issue(0, number, candidate(1 / (number + 1)))
        assert trial.number == number
        ledger.record(trial, measured(1 / (number + 1), num_items=200), f"fingerprint{number}")
        print(number, flush=True)
        if number == pause:
            sys.stdin.readline()


def drive(location: Location) -> None:
    """Take the lease and keep it, or say why not."""
    try:
        Ledger.drive(location, "one")
    except EvoMergeError as error:
        print(error, flush=True)
    else:
        print("driving", flush=True)
    time.sleep(60)


def read(location: Location, num_expected: int) -> None:
    """Look on until all trials are finished; whatever is seen must be whole. Print how often it changed."""
    ledger = Ledger.open(location)
    print("reading", flush=True)
    seen = {0}
    while max(seen) < num_expected:
        trials = ledger.trials()
        finished = [trial for trial in trials if trial.order is not None]
        for trial in trials:
            assert (trial.order is None) == (trial.measurement is None), "a result without its place or its scores"
            assert trial.measurement is None or trial.measurement.scores.keys() == {"math", "chat"}
        for measurement in ledger.measurements("search").values():
            assert measurement.scores.keys() == {"math", "chat"}
        assert sorted(trial.order for trial in finished) == list(range(len(finished)))
        if finished:
            assert len(finished[-1].measurement.scores["math"].items) == 2000
        seen.add(len(finished))
    print(len(seen), flush=True)


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    try:
        {"write": write, "drive": drive, "read": read}[what](locate(where), *map(int, rest))
    except EvoMergeError as lost:
        sys.exit(str(lost))
