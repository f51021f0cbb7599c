"""Paired differences, clustered by source, and the gap between search and test items."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.evidence.compare import Difference, paired_difference, paired_differences, search_test_gap
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
    difference, stderr = paired_difference(measured(up=ours), measured(up=theirs), [UP], {"up": range(num_items)})
    gains = ours - theirs
    assert difference == pytest.approx(gains.mean(), abs=1e-7)
    assert stderr == pytest.approx(gains.std(ddof=1) / np.sqrt(num_items), abs=1e-6)


def test_smaller_is_better_where_the_direction_says_so() -> None:
    low, high = measured(down=np.array([1.0, 2.0, 4.0])), measured(down=np.array([2.0, 2.0, 6.0]))
    assert paired_difference(low, high, [DOWN], {"down": [0, 1, 2]}).value == pytest.approx(1.0)
    assert paired_difference(high, low, [DOWN], {"down": [0, 1, 2]}).value == pytest.approx(-1.0)


def by_source(
    ours: Measurement, theirs: Measurement, objectives: list[Objective], sources: Mapping[str, list[str]]
) -> tuple[float, float]:
    """The sum over objectives of a ratio of source totals each, linearized, one source after the other."""
    everything = sorted({source for of_objective in sources.values() for source in of_objective})
    moved = dict.fromkeys(everything, 0.0)
    difference = 0.0
    for objective in objectives:
        one, other = (measurement.scores[objective.name].items.astype(float) for measurement in (ours, theirs))
        gain = objective.sign * (one.mean() - other.mean())
        difference += gain / len(objectives)
        for source, x, y in zip(sources[objective.name], one, other, strict=True):
            moved[source] += (objective.sign * (x - y) - gain) / len(one) / len(objectives)
    num = len(everything)
    return difference, float(np.sqrt(num / (num - 1) * sum(x**2 for x in moved.values())))


@given(st.integers(0, 2**31))
def test_several_objectives_over_shared_sources(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = {"up": [f"s{i}" for i in rng.integers(0, 8, 20)], "down": [f"s{i}" for i in rng.integers(0, 8, 12)]}
    ours, theirs = (measured(up=rng.random(20), down=rng.random(12)) for _ in range(2))
    expected = by_source(ours, theirs, [UP, DOWN], sources)
    assert paired_difference(ours, theirs, [UP, DOWN], sources) == pytest.approx(expected, rel=1e-9)
    each = paired_differences(ours, theirs, [UP, DOWN], sources)
    assert list(each) == ["up", "down"]
    assert each["down"] == pytest.approx(by_source(ours, theirs, [DOWN], {"down": sources["down"]}), rel=1e-9)
    assert expected[0] == pytest.approx((each["up"].value + each["down"].value) / 2)


def test_unequal_clusters_and_shared_sources_against_a_cluster_bootstrap() -> None:
    """Sources of 1 to 6 items, from which larger ones gain more; half of them occur in both objectives."""
    rng = np.random.default_rng(2)
    sources, ours, theirs = {}, {}, {}
    level = rng.normal(size=150)
    for name, first in (("up", 0), ("down", 50)):
        sizes = rng.integers(1, 7, 100)
        sources[name] = np.repeat(np.arange(first, first + 100), sizes)
        theirs[name] = rng.normal(size=len(sources[name]))
        sign = 1 if name == "up" else -1
        ours[name] = theirs[name] + sign * (level[sources[name]] + 0.2 * np.repeat(sizes, sizes))
    found = paired_difference(measured(**ours), measured(**theirs), [UP, DOWN], sources)
    resampled = []
    for _ in range(1500):
        counts = np.bincount(rng.integers(0, 150, 150), minlength=150)
        means = [
            sign * np.average(ours[name] - theirs[name], weights=counts[sources[name]])
            for name, sign in (("up", 1), ("down", -1))
        ]
        resampled.append(np.mean(means))
    assert found.value == pytest.approx(np.mean(resampled), abs=0.02)
    assert found.stderr == pytest.approx(np.std(resampled), rel=0.08)


def test_items_of_one_source_are_one_draw() -> None:
    """Every item seen four times: the error is that of the 20 sources, not of 80 items."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(20), rng.random(20)
    once = paired_difference(measured(up=ours), measured(up=theirs), [UP], {"up": range(20)})
    repeated = measured(up=np.repeat(ours, 4)), measured(up=np.repeat(theirs, 4))
    assert paired_difference(*repeated, [UP], {"up": np.repeat(range(20), 4).tolist()}) == pytest.approx(once)
    naive = paired_difference(*repeated, [UP], {"up": range(80)})
    assert naive.stderr == pytest.approx(once.stderr / 2, rel=0.05)


def test_the_items_difficulty_cancels() -> None:
    difficulty = np.random.default_rng(1).random(50)
    found = paired_difference(measured(up=difficulty + 0.125), measured(up=difficulty), [UP], {"up": range(50)})
    assert found.value == pytest.approx(0.125, abs=1e-6)
    assert found.stderr < 1e-6


def test_models_scored_on_other_items_do_not_pair() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        paired_difference(measured(up=np.ones(3)), measured(up=np.ones(4)), [UP], {"up": range(3)})


def test_the_gap_between_search_and_test_items_adds_their_variances() -> None:
    searched, tested = measured(down=np.array([1.0, 2.0, 3.0])), measured(down=np.array([2.0, 4.0]))
    gap = search_test_gap(searched, tested, [DOWN], {"down": "abc"}, {"down": "de"})
    assert gap == pytest.approx(Difference(1.0, np.sqrt(1 / 3 + 1.0)))  # a loss of 2 on search items, 3 on test items


def test_the_gap_of_the_mean_knows_of_sources_that_objectives_share() -> None:
    x = np.random.default_rng(3).random(40)
    one, both = measured(up=x), measured(up=x, down=-x)
    names = {"up": range(40), "down": range(40)}
    of_one = search_test_gap(one, one, [UP], names, names)
    assert search_test_gap(both, both, [UP, DOWN], names, names) == pytest.approx(of_one)
    apart = {"up": range(40), "down": range(40, 80)}
    assert search_test_gap(both, both, [UP, DOWN], apart, apart).stderr < 0.75 * of_one.stderr
