"""Nested MAP. Shape letters: N mixtures, K experts, M objectives."""

from collections.abc import Callable

import numpy as np
import pytest
from proposer_contract import ProposerContract, box

from evomerge.errors import CampaignError
from evomerge.proposers.nested_map import NestedMap, NestedMapOptions
from evomerge.proposers.proposer import Point, Problem
from evomerge.records import Candidate, Floats, Observation
from evomerge.space.space import Dimension

Values = Callable[[Floats], Floats | None]


class TestNestedMap(ProposerContract):
    proposer_type = NestedMap


def shares_of(quality_M: list[float], num_experts: int | None = None) -> Callable[[Floats], Floats]:
    """Shares, logit-quadratic: expert m alone has quality m in objective m, and every other expert costs a little."""
    own_MK = np.eye(len(quality_M), num_experts or len(quality_M))
    height_M = np.log(np.array(quality_M) / (1 - np.array(quality_M)))

    def values(levels_K: Floats) -> Floats:
        away_MK = np.where(own_MK > 0, 2.0 * (levels_K - 1.0) ** 2, 0.8 * levels_K**2)
        return np.asarray(1 / (1 + np.exp(-height_M + away_MK.sum(axis=1))))

    return values


def problem(num_experts: int, num_objectives: int) -> Problem:
    return Problem(dimensions=box(0.25, num_experts), num_objectives=num_objectives, seed=(0, 0))


def grow(proposer: NestedMap, values: Values, margins: Callable[[Floats], Floats] | None = None) -> list[list[Point]]:
    """Ask and tell until the search ends; return the batches that could be asked without waiting."""
    batches: list[list[Point]] = []
    index = 0
    while asked := proposer.ask(1000, []):
        batches.append([candidate.point for candidate in asked])
        for candidate in asked:
            point = np.array(candidate.point)
            margins_C = np.zeros(0) if margins is None else margins(point)
            proposer.tell(Observation(index=index, point=point, values_M=values(point), margins_C=margins_C))
            index += 1
    return batches


def experts_in(batch: list[Point]) -> set[int]:
    return set(np.flatnonzero(np.any(batch, axis=0)).tolist())


def best_mean(values: Callable[[Floats], Floats], corners_2K: Floats, objectives: list[int]) -> Floats:
    """The mixture of two models with the largest mean of some objectives, by trying a fine grid."""
    grid_N2 = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, 51)]), axis=-1).reshape(-1, 2)
    means_N = [values(mixture_2 @ corners_2K)[objectives].mean() for mixture_2 in grid_N2]
    return np.asarray(grid_N2[np.argmax(means_N)] @ corners_2K)


def test_the_tree_joins_the_nearest_qualities_first() -> None:
    """Of .9, .5, .52 and .8: the second and third, then the first and fourth; then what came of both."""
    values = shares_of([0.9, 0.5, 0.52, 0.8])
    leaves, low, low_best, high, high_best, root, root_best = grow(NestedMap(problem(4, 4), NestedMapOptions()), values)
    assert leaves == [tuple(row) for row in np.eye(4)]
    assert [experts_in(batch) for batch in (low, high, root)] == [{1, 2}, {0, 3}, {0, 1, 2, 3}]
    # A batch is the law without the two models themselves, and without the base, which the noise hit in both others.
    assert [len(batch) for batch in (low, low_best, high, high_best, root, root_best)] == [18, 1, 18, 1, 17, 1]
    assert (0.0, 0.0, 0.0, 0.0) in low + high
    np.testing.assert_allclose(low_best[0], best_mean(values, np.eye(4)[[1, 2]], [1, 2]), atol=0.03)
    np.testing.assert_allclose(high_best[0], best_mean(values, np.eye(4)[[0, 3]], [0, 3]), atol=0.03)
    pair_2K = np.array([low_best[0], high_best[0]])
    for point in root + root_best:  # the winners are mixed as wholes
        mixture_2 = np.linalg.lstsq(pair_2K.T, np.array(point), rcond=None)[0]
        np.testing.assert_allclose(mixture_2 @ pair_2K, point, atol=1e-12)
        assert ((mixture_2 >= -1e-9) & (mixture_2 <= 1 + 1e-9)).all()
    np.testing.assert_allclose(root_best[0], best_mean(values, pair_2K, [0, 1, 2, 3]), atol=0.03)


def test_the_law_of_a_pair_is_map_s() -> None:
    """A fifth has equal coefficients, half of that with noise; the rest is a grid without sums of 1."""
    _, mixtures, *_ = grow(NestedMap(problem(2, 2), NestedMapOptions()), shares_of([0.8, 0.7]))
    equal, noisy, grid_N2 = np.array(mixtures[:2]), np.array(mixtures[2:4]), np.array(mixtures[4:])
    assert (equal[:, 0] == equal[:, 1]).all()
    assert (noisy[:, 0] != noisy[:, 1]).any()
    assert (np.abs(grid_N2.sum(axis=1) - 1) > 1e-9).all()
    np.testing.assert_allclose(grid_N2 * 5, np.round(grid_N2 * 5), atol=1e-9)


def test_the_root_is_nearly_as_good_as_a_search_of_all_coefficients_can_find() -> None:
    from scipy.optimize import minimize

    values = shares_of([0.9, 0.6, 0.75, 0.85])
    *_, (root,) = grow(NestedMap(problem(4, 4), NestedMapOptions()), values)
    optimum = minimize(lambda levels_K: -values(levels_K).mean(), np.full(4, 0.5), bounds=[(0, 1)] * 4)
    uniform = values(np.full(4, 0.25)).mean()
    assert values(np.array(root)).mean() > -optimum.fun - 0.02 * (-optimum.fun - uniform)


def test_preferences_decide_where_a_trade_off_is_struck() -> None:
    def root(weights: list[float]) -> Floats:
        *_, (point,) = grow(NestedMap(problem(3, 3), NestedMapOptions(weights=weights)), shares_of([0.8, 0.7, 0.75]))
        return np.array(point)

    assert root([5.0, 1.0, 1.0])[0] > root([1.0, 1.0, 1.0])[0] + 0.1
    assert root([1.0, 1.0, 0.0])[2] < 0.05


def test_an_expert_that_is_best_at_nothing_still_takes_part() -> None:
    """The third helps in both objectives as far as 0.4; it is no owner, and answers for both."""
    own = shares_of([0.8, 0.7], num_experts=2)

    def values(levels_K: Floats) -> Floats:
        return own(levels_K[:2]) * (0.6 + 0.4 * np.exp(-4 * (levels_K[2] - 0.4) ** 2))

    batches = grow(NestedMap(problem(3, 2), NestedMapOptions()), values)
    assert batches[-1][0][2] == pytest.approx(0.4, abs=0.05)


def test_all_numbers_of_an_expert_move_together_within_their_ranges() -> None:
    """The first from -0.2 to 1.2 in two groups, the second to 0.5 at most: alone it is there. A density stays."""
    dimensions = tuple(
        Dimension(parameter=parameter, expert=expert, group=group, low=low, high=high, start=start)
        for parameter, expert, group, low, high, start in [
            ("coefficient", "a", "g0", -0.2, 1.2, 0.3),
            ("coefficient", "a", "g1", -0.2, 1.2, 0.3),
            ("coefficient", "b", "g0", 0.0, 0.5, 0.3),
            ("density", "a", None, 0.1, 0.9, 0.3),
        ]
    )

    def numbers(point_D: Point) -> Floats:
        return np.array([d.low + x * (d.high - d.low) for d, x in zip(dimensions, point_D, strict=True)])

    proposer = NestedMap(Problem(dimensions=dimensions, num_objectives=2, seed=(0, 0)), NestedMapOptions())
    batches = grow(proposer, lambda point_D: shares_of([0.8, 0.7])(numbers(tuple(point_D))[[0, 2]]))
    numbers_ND = np.array([numbers(point) for batch in batches for point in batch])
    np.testing.assert_allclose(numbers_ND[:2], [[1, 1, 0, 0.3], [0, 0, 0.5, 0.3]], atol=1e-12)
    np.testing.assert_allclose(numbers_ND[:, 0], numbers_ND[:, 1], atol=1e-12)
    np.testing.assert_allclose(numbers_ND[:, 3], 0.3)
    assert len(np.unique(numbers_ND[:, 2].round(9))) > 5  # the box is sampled, not its end over and over


def test_floors_count_in_the_last_pair() -> None:
    """The third expert's coefficient is to be 0.5 at least, which no pair without it keeps."""
    values = shares_of([0.8, 0.8, 0.4])

    def margins(levels_K: Floats) -> Floats:
        return levels_K[2:] - 0.5

    free = grow(NestedMap(problem(3, 3), NestedMapOptions()), values)
    held = grow(NestedMap(problem(3, 3), NestedMapOptions()), values, margins)
    assert held[:3] == free[:3]
    assert free[-1][0][2] < 0.45
    assert held[-1][0][2] == pytest.approx(0.5, abs=0.03)


def test_an_expert_that_cannot_be_scored_alone_is_paired_last() -> None:
    own = shares_of([0.8, 0.5, 0.5])

    def values(levels_K: Floats) -> Floats | None:
        return None if levels_K[1] > 0.9 else own(levels_K)

    batches = grow(NestedMap(problem(3, 3), NestedMapOptions()), values)
    assert [experts_in(batch) for batch in batches] == [{0, 1, 2}, {0, 2}, {0, 2}, {0, 1, 2}, {0, 1, 2}]
    assert 0.1 < batches[-1][0][1] <= 0.9


def test_a_record_of_three_workers_replays_from_any_point() -> None:
    """Three are under way, results come in any order, and none is asked while a pair waits for its last."""
    values, rng = shares_of([0.8, 0.5, 0.6]), np.random.default_rng(0)
    proposer = NestedMap(problem(3, 3), NestedMapOptions(num_startup=6))
    record: list[Candidate | Observation] = []
    pending: list[Observation] = []
    index = 0
    while True:
        asked = proposer.ask(3 - len(pending), [])
        for candidate in asked:
            record.append(candidate)
            point = np.array(candidate.point)
            pending.append(Observation(index=index, point=point, values_M=values(point)))
            index += 1
        if not pending:
            break
        record.append(pending.pop(rng.integers(len(pending))))
        proposer.tell(record[-1])
    assert index == 3 + 2 * 5
    for cut, entry in enumerate(record):
        if isinstance(entry, Observation):
            continue
        rebuilt = NestedMap(problem(3, 3), NestedMapOptions(num_startup=6))
        for earlier in record[:cut]:
            if isinstance(earlier, Candidate):
                rebuilt.recall(earlier)
            else:
                rebuilt.tell(earlier)
        assert rebuilt.ask(1, []) == [entry]


def test_what_it_needs_is_said() -> None:
    with pytest.raises(CampaignError, match="nested_map mixes experts two by two: .*found 1; use map"):
        NestedMap(problem(1, 1), NestedMapOptions())
    with pytest.raises(CampaignError, match="nested_map.weights: expected one number for each objective"):
        NestedMap(problem(3, 2), NestedMapOptions(weights=[1.0]))
