"""Run as a script: writes to the ledger in a folder until it is killed, or reads it until all is there."""

import sys
from itertools import count
from pathlib import Path

from ledger_contract import candidate, measured

from evomerge.ledger.ledger import Ledger


def write(folder: Path) -> None:
    """Issue and record without end; print each number after its record has returned."""
    ledger = Ledger.open(folder)
    start = len(ledger.trials())
    for number in count(start):
        trial = ledger.issue(0, number, candidate(1 / (number + 1)))
        assert trial.number == number
        ledger.record(trial, measured(1 / (number + 1), num_items=200), f"fingerprint{number}")
        print(number, flush=True)


def read(folder: Path, num_expected: int) -> None:
    """Look on until all trials are finished; whatever is seen must be whole. Print how often it changed."""
    ledger = Ledger.open(folder)
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
        seen.add(len(finished))
    print(len(seen), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        read(Path(sys.argv[2]), int(sys.argv[3]))
