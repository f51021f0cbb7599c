"""Improvements of a hypervolume equal what moocore says of the points with and without one more."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.front.improvement import Improvement, SampledImprovement, improvement_over, most_gaining
from evomerge.front.pareto import hypervolume

REFERENCE = -0.1


@given(
    num_objectives=st.integers(1, 5),
    num_points=st.integers(0, 12),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([2, 5, 1000]),  # few levels: equal coordinates and equal points
)
@settings(max_examples=150)
def test_volume_and_gains_are_moocores(num_objectives: int, num_points: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    points, asked = (
        rng.integers(0, levels, (number, num_objectives)) / levels - 0.2 * (levels > 5) for number in (num_points, 8)
    )
    reference = np.full(num_objectives, REFERENCE)
    improvement = Improvement(points, reference)
    before = hypervolume(points, reference)
    assert improvement.volume == pytest.approx(before, rel=1e-9, abs=1e-12)
    expected = [hypervolume(np.vstack([points, point]), reference) - before for point in asked]
    np.testing.assert_allclose(improvement.gains(asked), expected, rtol=1e-9, atol=1e-12)


@given(num_objectives=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=50)
def test_one_more_point_is_as_if_it_had_been_there(num_objectives: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, more, asked = (rng.random((number, num_objectives)) - 0.1 for number in (6, 3, 8))
    extended = Improvement(points, np.zeros(num_objectives))
    for value in more:
        extended = extended.with_point(value)
    at_once = Improvement(np.vstack([points, more]), np.zeros(num_objectives))
    assert extended.volume == pytest.approx(at_once.volume)
    np.testing.assert_allclose(extended.gains(asked), at_once.gains(asked), atol=1e-12)


def test_what_is_dominated_adds_exactly_nothing() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((60, 4))
    improvement = Improvement(points, np.zeros(4))
    assert (improvement.gains(points) == 0).all()
    assert (improvement.gains(points * 0.9) == 0).all()
    assert (improvement.gains(points - 2) == 0).all()


def test_many_points_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    improvement, asked = Improvement(rng.random((20, 3)), np.zeros(3)), rng.random((50, 3))
    whole = improvement.gains(asked)
    monkeypatch.setattr("evomerge.front.improvement.MAX_CELLS", 7)
    assert (improvement.gains(asked) == whole).all()


def test_without_points_a_point_adds_its_own_box() -> None:
    improvement = Improvement(np.zeros((0, 2)), np.array([0.0, 1.0]))
    assert improvement.volume == 0
    assert improvement.gains(np.array([[2.0, 4.0], [2.0, 0.5]])).tolist() == [6.0, 0.0]


@pytest.mark.parametrize("num_objectives", [2, 5, 8])
def test_sampled_directions_are_near_the_exact_volumes(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    points, more = rng.random((20, num_objectives)), 0.3 + 0.7 * rng.random((40, num_objectives))
    reference = np.full(num_objectives, -0.2)
    exact, sampled = Improvement(points, reference), SampledImprovement(points, reference)
    assert sampled.volume == pytest.approx(exact.volume, rel=0.05)
    assert np.corrcoef(exact.gains(more), sampled.gains(more))[0, 1] > 0.98
    assert sampled.with_point(more[0]).volume == pytest.approx(sampled.volume + sampled.gains(more[:1])[0])
    assert (sampled.gains(points - 0.01) == 0).all()


def test_few_objectives_are_exact() -> None:
    assert isinstance(improvement_over(np.zeros((0, 4)), np.zeros(4)), Improvement)
    assert isinstance(improvement_over(np.zeros((0, 5)), np.zeros(5)), SampledImprovement)


@given(num_objectives=st.integers(1, 5), num_points=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_what_gains_most_is_what_counting_all_again_would_choose(
    num_objectives: int, num_points: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    known, points = (rng.random((number, num_objectives)) for number in (5, num_points))
    draws, weights = points + rng.normal(0, 0.1, (7, *points.shape)), rng.random(num_points)
    reference = np.zeros(num_objectives)
    chosen = most_gaining(improvement_over(known, reference), points, draws, weights, 6)
    front, left = improvement_over(known, reference), list(range(num_points))
    for place in chosen:
        worth = [front.gains(draws[:, other]).mean() * weights[other] for other in left]
        assert worth[left.index(place)] == max(worth)
        left.remove(place)
        front = front.with_point(points[place])
    assert len(chosen) == min(6, num_points)
