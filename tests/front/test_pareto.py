"""Dominance and hypervolume against slow twins and closed forms."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.front.pareto import hypervolume, non_dominated


@st.composite
def values(draw: st.DrawFn, max_rows: int = 12, max_objectives: int = 4) -> np.ndarray:
    """Small whole numbers, so that ties, duplicates and dominated rows abound; or any floats."""
    shape = draw(st.integers(1, max_rows)), draw(st.integers(2, max_objectives))
    number = draw(st.sampled_from([st.integers(0, 4).map(float), st.floats(-1e6, 1e6)]))
    row = st.lists(number, min_size=shape[1], max_size=shape[1])
    return np.array(draw(st.lists(row, min_size=shape[0], max_size=shape[0])))


@given(values())
def test_non_dominated_equals_the_definition(values_NM: np.ndarray) -> None:
    expected = []
    for i, row in enumerate(values_NM):
        beaten = any((other >= row).all() and (other > row).any() for other in values_NM)
        repeated = any((values_NM[j] == row).all() for j in range(i))
        expected.append(not beaten and not repeated)
    assert non_dominated(values_NM).tolist() == expected


def test_nothing_is_dominated_among_nothing() -> None:
    assert non_dominated(np.zeros((0, 3))).tolist() == []


def by_inclusion_exclusion(values_NM: np.ndarray, reference_M: np.ndarray) -> float:
    """The volume of a union of boxes: every subset's intersection, added and taken away in turn."""
    boxes_NM = np.maximum(values_NM - reference_M, 0.0)
    total = 0.0
    for size in range(1, len(boxes_NM) + 1):
        for chosen in combinations(boxes_NM, size):
            total -= (-1) ** size * float(np.prod(np.min(chosen, axis=0)))
    return total


@given(values(max_rows=6, max_objectives=3), st.floats(-2, 3))
def test_hypervolume_equals_inclusion_and_exclusion(values_NM: np.ndarray, reference: float) -> None:
    reference_M = np.full(values_NM.shape[1], reference)
    scale = float(np.prod(np.maximum(values_NM - reference_M, 0.0).max(axis=0)))
    expected = by_inclusion_exclusion(values_NM, reference_M)
    assert hypervolume(values_NM, reference_M) == pytest.approx(expected, rel=1e-9, abs=1e-9 * (1 + scale))


@given(values(), st.integers(0, 2**31))
def test_hypervolume_never_falls_when_points_are_added(values_NM: np.ndarray, seed: int) -> None:
    reference_M = np.random.default_rng(seed).uniform(-1, 2, values_NM.shape[1])
    volumes = [hypervolume(values_NM[: n + 1], reference_M) for n in range(len(values_NM))]
    for before, after in pairwise(volumes):
        assert after >= before * (1 - 1e-12)


@given(values(), st.integers(0, 2**31))
def test_dominated_rows_add_nothing(values_NM: np.ndarray, seed: int) -> None:
    reference_M = np.random.default_rng(seed).uniform(-1, 2, values_NM.shape[1])
    front_NM = values_NM[non_dominated(values_NM)]
    assert hypervolume(front_NM, reference_M) == pytest.approx(hypervolume(values_NM, reference_M), rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "reference", "volume"),
    [
        ([[1.0, 1.0]], [0.0, 0.0], 1.0),
        ([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]], [0.0, 0.0], 6.0),
        ([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]], [1.0, 0.5], 1.0 + 1.0 + 0.5 - 0.5),
        ([[2.0, 3.0, 4.0]], [1.0, 1.0, 1.0], 6.0),
        ([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]], [0.0, 0.0, 0.0], 4.0),
        ([[-1.0, 5.0], [5.0, -1.0]], [0.0, 0.0], 0.0),
        ([[0.0, 5.0]], [0.0, 0.0], 0.0),
        ([[-0.2, -0.1]], [-1.0, -1.0], 0.72),
    ],
)
def test_hypervolume_of_known_fronts(rows: list[list[float]], reference: list[float], volume: float) -> None:
    """Worked out by hand; a row that is not above the reference in every objective adds nothing."""
    assert hypervolume(np.array(rows), np.array(reference)) == pytest.approx(volume, rel=1e-12)


def test_hypervolume_of_a_line_of_many() -> None:
    """N points on x + y = 1 in equal steps cover (1 - 1/N) / 2: the triangle less half the steps."""
    num_points = 200
    x = np.arange(num_points + 1) / num_points
    expected = 0.5 * (1 - 1 / num_points)
    assert hypervolume(np.stack([x, 1 - x], axis=1), np.zeros(2)) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume(np.zeros((0, 2)), np.zeros(2)) == 0.0


@pytest.mark.parametrize("flaw", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(flaw: float) -> None:
    values_NM = np.array([[0.5, 0.5], [flaw, 0.7]])
    with pytest.raises(ValueError, match="finite"):
        non_dominated(values_NM)
    with pytest.raises(ValueError, match="finite"):
        hypervolume(values_NM, np.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        hypervolume(np.ones((1, 2)), np.array([0.0, flaw]))


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        non_dominated(np.zeros(shape))
