"""Picking from fronts whose knee and best compromise are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.front.pick import knee, prefer


def arc(*, concave: bool, num_points: int = 21) -> np.ndarray:
    """A quarter circle between (0, 1) and (1, 0): bulging away from the origin, or towards it ("concave")."""
    angle = np.linspace(0, np.pi / 2, num_points)
    outward = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return 1 - outward if concave else outward


CORNER = np.array([[0.0, 1.0], [0.5, 0.95], [0.8, 0.85], [0.9, 0.4], [1.0, 0.0]])


def test_the_knee_is_where_the_front_bends() -> None:
    assert knee(CORNER) == 2
    assert knee(arc(concave=False)) == 10


def test_the_knee_does_not_depend_on_the_objectives_units() -> None:
    assert knee(CORNER * np.array([1000.0, 0.01]) + np.array([-50.0, 7.0])) == 2


def test_the_knee_of_three_objectives() -> None:
    ends = np.eye(3)
    assert knee(np.vstack([ends, [[0.5, 0.5, 0.4]], [[0.3, 0.3, 0.3]]])) == 3


def test_one_member_is_its_own_knee_and_preference() -> None:
    assert knee(np.array([[0.3, 0.7]])) == 0
    assert prefer(np.array([[0.3, 0.7]]), np.array([1.0, 2.0])) == 0


def test_an_objective_in_which_all_are_equal_does_not_matter() -> None:
    with_constant = np.hstack([CORNER, np.full((5, 1), 0.3)])
    assert knee(with_constant) == 2
    assert prefer(with_constant, np.array([1.0, 1.0, 5.0])) == prefer(CORNER, np.array([1.0, 1.0]))


def test_a_concave_front_is_reached_where_a_weighted_sum_finds_only_its_ends() -> None:
    front = arc(concave=True)
    preferred = {prefer(front, np.array([share, 1 - share])) for share in np.linspace(0.05, 0.95, 19)}
    by_sum = {int(np.argmax(front @ [share, 1 - share])) for share in np.linspace(0.05, 0.95, 19)}
    assert by_sum <= {0, len(front) - 1}
    assert len(preferred - {0, len(front) - 1}) >= 8
    assert prefer(front, np.array([1.0, 1.0])) == 10


def test_twice_the_weight_counts_a_shortfall_twice() -> None:
    """On the line x + y = 1: w_x (1 - x) = w_y (1 - y) at x = w_x / (w_x + w_y)."""
    x = np.linspace(0, 1, 31)
    line = np.stack([x, 1 - x], axis=1)
    assert x[prefer(line, np.array([2.0, 1.0]))] == pytest.approx(2 / 3)
    assert x[prefer(line, np.array([1.0, 2.0]))] == pytest.approx(1 / 3)
    assert x[prefer(line, np.array([10.0, 5.0]))] == pytest.approx(2 / 3)


def test_all_weight_on_one_objective_gives_its_best() -> None:
    assert prefer(CORNER, np.array([1.0, 0.0])) == 4
    assert prefer(CORNER, np.array([0.0, 3.0])) == 0


def test_of_two_equal_in_the_preferred_objective_the_better_in_the_other_is_taken() -> None:
    front = np.array([[1.0, 0.2], [1.0, 0.6], [0.0, 1.0]])
    assert prefer(front, np.array([1.0, 1e-3])) == 1


def test_of_two_with_the_same_worst_shortfall_the_better_in_all_is_taken() -> None:
    front = np.vstack([np.eye(3), [[0.5, 0.6, 0.7], [0.5, 0.9, 0.65]]])
    assert prefer(front, np.ones(3)) == 4


@given(
    st.lists(st.tuples(*[st.integers(0, 9).map(float)] * 3), min_size=1, max_size=15),
    st.tuples(*[st.floats(0.1, 10)] * 3),
)
def test_what_is_preferred_is_never_dominated(rows: list[tuple[float, ...]], weights: tuple[float, ...]) -> None:
    values_NM = np.array(rows)
    chosen = values_NM[prefer(values_NM, np.array(weights))]
    strictly_better = (values_NM > chosen).all(axis=1)
    assert not strictly_better.any()
