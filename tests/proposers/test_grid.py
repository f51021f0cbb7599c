from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proposer_contract import ProposerContract, box
from pydantic import ValidationError
from scipy.stats.qmc import discrepancy

from evomerge.proposers.grid import Grid, GridOptions
from evomerge.proposers.proposer import Problem


def points_of(levels: int, num_dimensions: int, num_points: int, seed: int = 0) -> list[tuple[float, ...]]:
    problem = Problem(dimensions=box(0.3, num_dimensions), num_objectives=1, seed=(seed, 0))
    return [candidate.point for candidate in Grid(problem, GridOptions(levels=levels)).ask(num_points, [])]


class TestGrid(ProposerContract):
    proposer_type = Grid
    options = {"levels": 3}

    def test_stops_when_every_point_was_asked(self) -> None:
        proposer = self.make()
        assert len(proposer.ask(20, [])) == 20
        assert len(proposer.ask(20, [])) == 7
        assert proposer.ask(1, []) == []


@settings(max_examples=30)
@given(levels=st.integers(2, 7), num_dimensions=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_every_combination_comes_once(levels: int, num_dimensions: int, seed: int) -> None:
    points = points_of(levels, num_dimensions, levels**num_dimensions + 1, seed)
    steps = np.linspace(0.0, 1.0, levels)
    assert len(points) == levels**num_dimensions
    np.testing.assert_allclose(sorted(points), list(product(steps, repeat=num_dimensions)), atol=1e-15)


@pytest.mark.parametrize(("levels", "num_dimensions"), [(5, 2), (11, 2), (5, 3), (4, 4)])
def test_any_beginning_is_spread_out(levels: int, num_dimensions: int) -> None:
    """More even than the beginnings of a random order, by their discrepancy."""
    num_points = levels**num_dimensions
    usual_ND = np.array(list(product(np.linspace(0.0, 1.0, levels), repeat=num_dimensions)))
    ours, shuffled = [], []
    for seed in range(5):
        ours_ND = np.array(points_of(levels, num_dimensions, num_points, seed))
        shuffled_ND = np.random.default_rng(seed).permutation(usual_ND)
        for length in range(2, num_points // 2):
            ours.append(discrepancy(ours_ND[:length]))
            shuffled.append(discrepancy(shuffled_ND[:length]))
    assert np.mean(ours) < 0.8 * np.mean(shuffled)


def test_every_half_and_quarter_is_visited_in_turn() -> None:
    """With a power of two of levels the order is a net: 4 points fill the quadrants, 16 a 4 x 4 board."""
    for seed in range(5):
        points_ND = np.array(points_of(8, 2, 64, seed))
        for side in (2, 4, 8):
            cells = np.minimum((points_ND[: side**2] * side).astype(int), side - 1)
            assert len({tuple(cell) for cell in cells}) == side**2


def test_a_grid_that_nobody_can_list_is_begun() -> None:
    points = points_of(levels=5, num_dimensions=100, num_points=50)
    assert len(set(points)) == 50


def test_one_level_is_no_grid() -> None:
    with pytest.raises(ValidationError, match="levels"):
        GridOptions(levels=1)
