"""What is kept of the trials so far says what all of them would."""

import numpy as np
import pytest

from evomerge.front.front import front_hypervolume, front_of
from evomerge.front.so_far import SoFar
from evomerge.records import Candidate, Measurement, Objective, Score, Trial

OBJECTIVES = (
    Objective(name="math", direction="max"),
    Objective(name="loss", direction="min"),
    Objective(name="part", direction="max", steers=False, floor=0.3),
)


def measured(*values: float, stopped: str | None = None) -> Measurement:
    items = np.zeros(1, dtype=np.float32)
    scores = {
        objective.name: Score(value=value, stderr=0.1, items=items)
        for objective, value in zip(OBJECTIVES, values, strict=True)
    }
    return Measurement(split="search", scores=scores, cost=1.0, seconds={}, stopped=stopped)


def trial(number: int, measurement: Measurement | None) -> Trial:
    candidate = Candidate(point=(0.5,))
    return Trial(
        number=number, stage=0, index=number, candidate=candidate, known=0, order=number, measurement=measurement
    )


@pytest.mark.parametrize("seed", range(5))
def test_best_front_and_volume_are_those_of_all_trials(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = measured(0.2, 0.8, 0.5)
    so_far = SoFar(OBJECTIVES, base)
    trials = [trial(n, measured(*rng.integers(0, 10, size=3) / 10)) for n in range(60)]
    for n, one in enumerate(trials, start=1):
        so_far.add(one)
        assert so_far.volume == pytest.approx(front_hypervolume(trials[:n], OBJECTIVES, base), abs=1e-12)
        assert so_far.num_on_front == len(front_of(trials[:n], OBJECTIVES))
    values_NM = np.array([[score.value for score in one.measurement.scores.values()] for one in trials])  # type: ignore[union-attr]
    assert so_far.best == {"math": values_NM[:, 0].max(), "loss": values_NM[:, 1].min()}


def test_what_failed_or_was_stopped_only_counts() -> None:
    so_far = SoFar(OBJECTIVES, measured(0.0, 1.0, 0.0))
    so_far.add(trial(0, None))
    so_far.add(trial(1, measured(0.9, 0.1, 0.9, stopped="hopeless")))
    assert (so_far.counts, so_far.volume) == ({"scored": 0, "stopped": 1, "failed": 1}, 0.0)
