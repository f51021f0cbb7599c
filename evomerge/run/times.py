"""Where the time of a search went: the driver's own, and what its workers did with theirs.

All of it is read from the trials' fates: each says how long its worker had it and was idle before, and what the driver
did since the result before it (so that the seconds of committing a result stand with the next one).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.records import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTime:
    """What one worker did: results that it brought, seconds in which it had a candidate, and in which it had none.

    Of a candidate that raced, all rounds count as the last one's worker's.
    """

    worker: str
    num_results: int
    busy_s: float
    idle_s: float

    @property
    def utilisation(self) -> float:
        """The busy share of its time, from when it opened to its last result."""
        return self.busy_s / max(self.busy_s + self.idle_s, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Where the time of some trials went, in seconds.

    driver: by part, in the order of size: ``propose`` (ask and tell), ``record`` (commits), ``submit``, ``show``, and
    ``wait`` for the workers, which of a run in one process is their work. parts: the workers' busy time, by what the
    scorer did; ``way`` is what came on top of it, ``failed`` the time of candidates that failed. queue_s: all
    candidates' waiting for a worker. Trials of earlier versions have none of it.
    """

    driver: Mapping[str, float]
    workers: Sequence[WorkerTime]
    parts: Mapping[str, float]
    queue_s: float

    @property
    def search_s(self) -> float:
        """How long drivers searched; what lies between two of them does not count."""
        return sum(self.driver.values())

    @property
    def utilisation(self) -> float:
        """The busy share of all workers' time."""
        busy_s, idle_s = sum(worker.busy_s for worker in self.workers), sum(worker.idle_s for worker in self.workers)
        return busy_s / max(busy_s + idle_s, 1e-9)


def times_of(trials: Sequence[Trial]) -> Times:
    """Return where the time of the trials went that have a result."""
    driver, parts, queue_s = Counter[str](), Counter[str](), 0.0
    counts, busy, idle = Counter[str](), Counter[str](), Counter[str]()
    for trial in trials:
        fate = trial.fate
        if "busy_s" not in fate:
            continue
        driver.update(fate.get("driver", {}))
        queue_s += fate.get("queue_s", 0.0)
        counts[fate["worker"]] += 1
        busy[fate["worker"]] += fate["busy_s"]
        idle[fate["worker"]] += fate["idle_s"]
        seconds = trial.measurement.seconds if trial.measurement else {"failed": fate["busy_s"]}
        parts.update({**seconds, "way": max(fate["busy_s"] - sum(seconds.values()), 0.0)})
    workers = [
        WorkerTime(worker=worker, num_results=counts[worker], busy_s=busy[worker], idle_s=idle[worker])
        for worker in sorted(counts)
    ]
    return Times(driver=dict(driver.most_common()), workers=workers, parts=dict(parts.most_common()), queue_s=queue_s)
