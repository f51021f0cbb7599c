"""Paired differences, clustered by source."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.front.compare import paired_difference
from evomerge.records import Measurement, Objective, Score


def measured(**items: np.ndarray) -> Measurement:
    scores = {
        name: Score(value=float(x.mean()), stderr=float(x.std(ddof=1) / np.sqrt(len(x))), items=x.astype(np.float32))
        for name, x in items.items()
    }
    return Measurement(split="test", scores=scores, cost=1.0, seconds={})


UP = Objective(name="up", task="a", metric="accuracy", direction="max")
DOWN = Objective(name="down", task="b", metric="loss", direction="min")


@given(st.integers(2, 60), st.integers(0, 2**31))
def test_one_objective_with_a_source_an_item_is_the_paired_t_statistics_own(num_items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = (rng.integers(0, 2, num_items).astype(np.float32) for _ in range(2))
    difference, stderr = paired_difference(measured(up=ours), measured(up=theirs), [UP], {"a": range(num_items)})
    gains = ours - theirs
    assert difference == pytest.approx(gains.mean(), abs=1e-7)
    assert stderr == pytest.approx(gains.std(ddof=1) / np.sqrt(num_items), abs=1e-6)


def test_smaller_is_better_where_the_direction_says_so() -> None:
    low, high = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 6.0])
    difference, _ = paired_difference(measured(down=low), measured(down=high), [DOWN], {"b": [0, 1, 2]})
    assert difference == pytest.approx(1.0)
    assert paired_difference(measured(down=high), measured(down=low), [DOWN], {"b": [0, 1, 2]})[0] == pytest.approx(
        -1.0
    )


def by_jackknife(
    ours: Measurement, theirs: Measurement, objectives: list[Objective], sources: Mapping[str, list[str]]
) -> tuple[float, float]:
    """The sum of contributions, and its error by leaving out one source after the other (linear, so exact)."""
    everything = sorted({source for task in sources.values() for source in task})

    def total(left_out: str | None) -> float:
        summed = 0.0
        for objective in objectives:
            ours_items, theirs_items = (
                measurement.scores[objective.name].items.astype(np.float64) for measurement in (ours, theirs)
            )
            for source, one, other in zip(sources[objective.task], ours_items, theirs_items, strict=True):
                if source != left_out:
                    summed += objective.sign * (one - other) / len(ours_items) / len(objectives)
        return summed

    num = len(everything)
    pseudo = np.array([num * total(None) - (num - 1) * num / (num - 1) * total(source) for source in everything])
    return total(None), float(np.sqrt(pseudo.var(ddof=1) / num))


@given(st.integers(0, 2**31))
def test_several_objectives_over_shared_sources(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = {"a": [f"s{i}" for i in rng.integers(0, 8, 20)], "b": [f"s{i}" for i in rng.integers(0, 8, 12)]}
    ours, theirs = (measured(up=rng.random(20), down=rng.random(12)) for _ in range(2))
    expected = by_jackknife(ours, theirs, [UP, DOWN], sources)
    assert paired_difference(ours, theirs, [UP, DOWN], sources) == pytest.approx(expected, rel=1e-9)


def test_items_of_one_source_are_one_draw() -> None:
    """Every item seen four times: the error is that of the 20 sources, not of 80 items."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(20), rng.random(20)
    once = paired_difference(measured(up=ours), measured(up=theirs), [UP], {"a": range(20)})
    repeated = paired_difference(
        measured(up=np.repeat(ours, 4)),
        measured(up=np.repeat(theirs, 4)),
        [UP],
        {"a": np.repeat(range(20), 4).tolist()},
    )
    naive = paired_difference(
        measured(up=np.repeat(ours, 4)), measured(up=np.repeat(theirs, 4)), [UP], {"a": range(80)}
    )
    assert repeated == pytest.approx(once)
    assert naive[1] == pytest.approx(once[1] / 2, rel=0.05)


def test_the_items_difficulty_cancels() -> None:
    difficulty = np.random.default_rng(1).random(50)
    difference, stderr = paired_difference(
        measured(up=difficulty + 0.125), measured(up=difficulty), [UP], {"a": range(50)}
    )
    assert difference == pytest.approx(0.125, abs=1e-6)
    assert stderr < 1e-6
