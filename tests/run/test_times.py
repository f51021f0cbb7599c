"""Where the time went, of trials whose fates are known."""

import pytest

from evomerge.records import Candidate, Measurement, Trial
from evomerge.run.times import Times, times_of


def trial(number: int, worker: str, *, busy: float, idle: float, driver: dict[str, float], **ending: object) -> Trial:
    fate = {"worker": worker, "busy_s": busy, "idle_s": idle, "queue_s": 0.5, "driver": driver}
    candidate = Candidate(point=(0.5,))
    return Trial(number=number, stage=0, index=number, candidate=candidate, known=0, order=number, fate=fate, **ending)


def measured(**seconds: float) -> Measurement:
    return Measurement(split="search", scores={}, cost=1.0, seconds=seconds)


@pytest.fixture
def times() -> Times:
    old = Trial(number=3, stage=0, index=3, candidate=Candidate(point=(0.5,)), known=0, order=3, fate={"worker": "c"})
    return times_of(
        [
            trial(0, "b", busy=4, idle=1, driver={"wait": 4, "record": 1}, measurement=measured(evaluate=3)),
            trial(1, "a", busy=6, idle=0, driver={"wait": 2}, measurement=measured(evaluate=4, materialize=2)),
            trial(2, "b", busy=5, idle=0, driver={"propose": 3, "wait": 1}, failure="out of memory"),
            old,
        ]
    )


def test_the_drivers_seconds_add_up(times: Times) -> None:
    assert times.driver == {"wait": 7, "propose": 3, "record": 1}
    assert list(times.driver) == ["wait", "propose", "record"]
    assert times.search_s == 11


def test_each_workers_time_is_its_own(times: Times) -> None:
    assert [(worker.worker, worker.num_results, worker.utilisation) for worker in times.workers] == [
        ("a", 1, 1.0),
        ("b", 2, 0.9),
    ]
    assert times.utilisation == 15 / 16


def test_busy_time_has_parts_and_what_failed_took_time_too(times: Times) -> None:
    assert times.parts == {"evaluate": 7, "failed": 5, "materialize": 2, "way": 1}
    assert sum(times.parts.values()) == sum(worker.busy_s for worker in times.workers)
    assert times.queue_s == 1.5


def test_of_nothing_there_is_nothing() -> None:
    times = times_of([])
    assert (times.driver, times.workers, times.search_s, times.utilisation) == ({}, [], 0, 0)
