"""The front of a run's trials: directions, floors and ceilings, failures."""

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.front.front import front_hypervolume, front_of, maximized, violation
from evomerge.records import Candidate, Measurement, Objective, Score, Trial

ACCURACY = Objective(name="accuracy", task="math", metric="accuracy", direction="max")
LENGTH = Objective(name="length", task="chat", metric="tokens", direction="min")


def measured(accuracy: float, length: float) -> Measurement:
    def score(value: float) -> Score:
        return Score(value=value, stderr=0.0, items=np.full(2, value, dtype=np.float32))

    return Measurement(
        split="search", scores={"accuracy": score(accuracy), "length": score(length)}, cost=1.0, seconds={}
    )


def trials(*outcomes: tuple[float, float] | str | None) -> list[Trial]:
    """(accuracy, length), a reason for failing, or None for a trial that is still running."""
    made = []
    for number, outcome in enumerate(outcomes):
        measurement = measured(*outcome) if isinstance(outcome, tuple) else None
        failure = outcome if isinstance(outcome, str) else None
        candidate = Candidate(point=(number / 10,))
        made.append(
            Trial(
                number=number,
                stage=0,
                index=number,
                candidate=candidate,
                known=0,
                measurement=measurement,
                failure=failure,
            )
        )
    return made


def numbers(front: Sequence[Trial]) -> list[int]:
    return [trial.number for trial in front]


def test_smaller_is_better_where_the_direction_says_so() -> None:
    run = trials((0.5, 10.0), (0.6, 20.0), (0.5, 30.0), (0.4, 5.0), (0.6, 15.0))
    assert numbers(front_of(run, [ACCURACY, LENGTH])) == [4, 0, 3]
    assert maximized(measured(0.6, 15.0), [ACCURACY, LENGTH]).tolist() == [0.6, -15.0]


def test_best_first_in_the_first_objective() -> None:
    run = trials((0.5, 10.0), (0.6, 20.0), (0.4, 5.0))
    assert numbers(front_of(run, [LENGTH, ACCURACY])) == [2, 0, 1]


def test_failed_and_unfinished_trials_are_not_on_the_front() -> None:
    run = trials("out of memory", (0.5, 10.0), None)
    assert numbers(front_of(run, [ACCURACY, LENGTH])) == [1]
    assert front_of(trials("out of memory", None), [ACCURACY, LENGTH]) == []


def test_of_equal_trials_the_first_counts() -> None:
    assert numbers(front_of(trials((0.5, 10.0), (0.5, 10.0)), [ACCURACY, LENGTH])) == [0]


def test_floors_and_ceilings_come_before_dominance() -> None:
    """Trial 1 dominates but misses the ceiling, so what it dominates is on the front."""
    run = trials((0.5, 10.0), (0.9, 9.0), (0.3, 1.0))
    floored = Objective(name="accuracy", task="math", metric="accuracy", direction="max", floor=0.4, ceiling=0.8)
    assert numbers(front_of(run, [ACCURACY, LENGTH])) == [1, 2]
    assert numbers(front_of(run, [floored, LENGTH])) == [0]


def test_a_value_on_its_floor_or_ceiling_keeps_it() -> None:
    limited = Objective(name="length", task="chat", metric="tokens", direction="min", floor=5.0, ceiling=10.0)
    assert numbers(front_of(trials((0.5, 10.0), (0.4, 5.0)), [ACCURACY, limited])) == [0, 1]


def test_violations_add_up_in_the_users_own_units() -> None:
    floored = Objective(name="accuracy", task="math", metric="accuracy", direction="max", floor=0.8)
    limited = Objective(name="length", task="chat", metric="tokens", direction="min", ceiling=10.0)
    assert violation(measured(0.5, 12.0), [floored, limited]) == pytest.approx(0.3 + 2.0)
    assert violation(measured(0.9, 10.0), [floored, limited]) == 0


def test_hypervolume_above_a_reference_model() -> None:
    run = trials((0.6, 20.0), (0.5, 10.0), (0.55, 25.0), "failed")
    base = measured(0.4, 30.0)
    expected = 0.1 * 10 + 0.1 * 20  # the strip above 0.5 up to 20 tokens, and the strip below it up to 10
    assert front_hypervolume(run, [ACCURACY, LENGTH], base) == pytest.approx(expected)
    assert front_hypervolume(trials("failed"), [ACCURACY, LENGTH], base) == 0.0
    assert front_hypervolume(run, [ACCURACY, LENGTH], measured(0.6, 1.0)) == 0.0
