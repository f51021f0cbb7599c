"""MAP and Bayesian MAP. Shape letters: N points, D dimensions, K experts, M objectives."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposer_contract import ProposerContract, box

from evomerge.errors import CampaignError
from evomerge.front.pareto import hypervolume
from evomerge.proposers.bayesian_map import BayesianMap, BayesianMapOptions, Bins, angles, direction
from evomerge.proposers.map import TRUST_RADIUS, Map, MapOptions, Merits, SamplingLaw, predicted_front
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Floats, Observation
from evomerge.space.space import Dimension


def problem(
    num_dimensions: int, num_objectives: int = 2, seed: int = 0, history: tuple[Observation, ...] = ()
) -> Problem:
    return Problem(dimensions=box(0.25, num_dimensions), num_objectives=num_objectives, seed=(seed, 0), history=history)


def grouped(num_experts: int, num_groups: int, low: float = 0.0, high: float = 1.0) -> tuple[Dimension, ...]:
    return tuple(
        Dimension(parameter="coefficient", expert=f"e{k}", group=f"g{g}", low=low, high=high, start=low)
        for k in range(num_experts)
        for g in range(num_groups)
    )


def law_of(num_experts: int, num_points: int, isotropic: float = 0.0, seed: int = 0) -> Floats:
    law = SamplingLaw(problem(num_experts, seed=seed), num_points, isotropic)
    return np.array([law.point(index) for index in range(num_points)])


def search(
    proposer: Map, values: Callable[[Floats], Floats], num_asks: int, margins: Callable[[Floats], Floats] | None = None
) -> Floats:
    """Ask and tell one by one; return the points."""
    points = []
    for index in range(num_asks):
        (candidate,) = proposer.ask(1, [])
        point = np.array(candidate.point)
        margins_C = np.zeros(0) if margins is None else margins(point)
        proposer.tell(Observation(index=index, point=point, values_M=values(point), margins_C=margins_C))
        points.append(point)
    return np.array(points)


def logit_quadratic(num_dimensions: int, num_objectives: int) -> Callable[[Floats], Floats]:
    """Shares with a peak an objective, each on its own side of the box."""
    peaks_MD = np.full((num_objectives, num_dimensions), 0.3)
    peaks_MD[np.arange(num_objectives), np.arange(num_objectives)] = 0.7
    return lambda point_D: 1 / (1 + np.exp(4 * ((point_D - peaks_MD) ** 2).sum(axis=1) - 1.5))


class TestMap(ProposerContract):
    proposer_type = Map
    options = {"num_startup": 8}
    num_asks = 18


class TestBayesianMap(ProposerContract):
    proposer_type = BayesianMap
    options = {"num_startup": 12, "num_initial": 6}
    num_asks = 18


@pytest.mark.parametrize(("num_experts", "num_levels"), [(2, 5), (3, 4), (4, 3), (6, 3)])
def test_the_law_is_experts_alone_then_the_grid_without_excluded_points(num_experts: int, num_levels: int) -> None:
    num_points = (num_experts + 1) * (num_experts + 2)
    points_NK = law_of(num_experts, num_points)
    assert (points_NK[:num_experts] == np.eye(num_experts)).all()
    grid_NK = points_NK[num_experts:]
    assert len(grid_NK) == num_points - num_experts
    assert len(np.unique(points_NK, axis=0)) == num_points
    np.testing.assert_allclose(np.unique(grid_NK), np.linspace(0, 1, num_levels))
    assert (np.abs(grid_NK.sum(axis=1) - 1) > 1e-9).all()
    assert (np.ptp(grid_NK, axis=1) > 0).all()


def test_the_isotropic_share_has_all_experts_equal_and_half_of_it_noise() -> None:
    points_NK = law_of(4, 30, isotropic=0.2)[4:10]
    assert np.ptp(points_NK[:3], axis=1) == pytest.approx(0)
    assert (np.ptp(points_NK[3:], axis=1) > 0).all()


def test_with_eight_experts_the_law_determines_a_quadratic() -> None:
    """The published grid has two levels then, where squares equal their roots: rank 37 of 45."""

    def rank(points_NK: Floats) -> int:
        first_Q, second_Q = np.triu_indices(8)
        products_NQ = points_NK[:, first_Q] * points_NK[:, second_Q]
        return int(np.linalg.matrix_rank(np.column_stack([np.ones(len(points_NK)), points_NK, products_NQ])))

    two_levels_NK = np.array(np.unravel_index(np.arange(256), (2,) * 8)).T.astype(float)
    assert rank(two_levels_NK) == 37
    assert rank(law_of(8, 90)) == 45


def test_several_numbers_an_expert_vary_around_the_expert_s_level() -> None:
    law = SamplingLaw(Problem(dimensions=grouped(2, 8), num_objectives=2, seed=(0, 0)), 40, 0.0)
    points_ND = np.array([law.point(index) for index in range(40)])
    assert (points_ND[0] == [1.0] * 8 + [0.0] * 8).all()  # an expert alone is all of it
    assert np.linalg.matrix_rank(points_ND) == 16
    np.testing.assert_allclose(law.levels(points_ND)[:2], np.eye(2))
    inner = law.place(np.array([0.5, 0.6]), index=7)
    assert law.levels(inner[None])[0] == pytest.approx([0.5, 0.6], abs=0.2)
    assert np.abs(inner[:8] - 0.5).max() <= 0.25


def test_the_law_is_in_coefficients_and_spreads_what_is_none() -> None:
    """From -0.2 to 1.2, an expert alone is at 1; from 0.1 to 0.4, at 0.4; a density takes its whole range."""
    ranges = [("coefficient", "a", -0.2, 1.2), ("coefficient", "b", 0.1, 0.4), ("density", None, 0.1, 0.9)]
    dimensions = tuple(
        Dimension(parameter=name, expert=expert, group=None, low=low, high=high, start=low)
        for name, expert, low, high in ranges
    )
    law = SamplingLaw(Problem(dimensions=dimensions, num_objectives=2, seed=(0, 0)), 32, 0.0)
    points_ND = np.array([law.point(index) for index in range(32)])
    low_D, high_D = np.array([d.low for d in dimensions]), np.array([d.high for d in dimensions])
    numbers_ND = low_D + points_ND * (high_D - low_D)
    np.testing.assert_allclose(numbers_ND[:2, :2], [[1.0, 0.1], [0.0, 0.4]])
    assert numbers_ND[:, 0].min() == pytest.approx(0.0)
    assert numbers_ND[:, 0].max() == pytest.approx(1.0)
    counts, _ = np.histogram(points_ND[:, 2], bins=8, range=(0, 1))
    assert (counts == 4).all()


@pytest.mark.parametrize("proposer_type", [Map, BayesianMap])
def test_a_space_without_coefficients_of_experts_is_searched_too(proposer_type: type[Map]) -> None:
    dimensions = (
        Dimension(parameter="operator", expert=None, group=None, low=0.0, high=1.0, start=0.25),
        Dimension(parameter="coefficient", expert=None, group=None, low=-1.0, high=2.0, start=0.0),
    )
    proposer = proposer_type(
        Problem(dimensions=dimensions, num_objectives=2, seed=(0, 0)), proposer_type.options_type(num_startup=8)
    )
    points_ND = search(proposer, logit_quadratic(2, 2), 16)
    assert ((points_ND >= 0) & (points_ND <= 1)).all()
    counts, _ = np.histogram(points_ND[:8, 1], bins=4, range=(0, 1))
    assert (counts == 2).all()


def test_the_law_ends_nowhere_and_stays_in_the_box() -> None:
    points_NK = law_of(3, 20)
    law = SamplingLaw(problem(3), 20, 0.0)
    beyond_NK = np.array([law.point(index) for index in range(20, 84)])
    assert ((beyond_NK >= 0) & (beyond_NK <= 1)).all()
    assert len(np.unique(np.vstack([points_NK, beyond_NK]), axis=0)) == 84


def test_the_front_of_known_quadratics_is_found() -> None:
    """Two concave bowls of one shape: the front is the straight line between their peaks."""
    peaks_2D = np.array([[0.2, 0.8, 0.5, 0.4, 0.6, 0.3], [0.7, 0.3, 0.4, 0.6, 0.6, 0.5]])

    def merits(points_ND: Floats) -> Floats:
        return -((points_ND[:, None] - peaks_2D) ** 2).sum(axis=2)

    data_ND = np.random.default_rng(0).random((60, 6))
    front_SD = predicted_front(merits, data_ND, np.random.default_rng(1))
    true_ND = peaks_2D[0] + np.linspace(0, 1, 200)[:, None] * (peaks_2D[1] - peaks_2D[0])
    off_line_S = np.linalg.norm(front_SD[:, None] - true_ND, axis=2).min(axis=1)
    assert off_line_S.max() < 0.1
    assert np.median(off_line_S) < 0.03
    reference_M = merits(peaks_2D).min(axis=0)
    found, whole = hypervolume(merits(front_SD), reference_M), hypervolume(merits(true_ND), reference_M)
    assert 0.98 * whole < found <= whole * 1.01  # 200 points of a curve are a little less than the curve


def test_the_predicted_front_stays_near_the_data_and_in_the_box() -> None:
    data_ND = 0.3 * np.random.default_rng(0).random((20, 4))
    front_SD = predicted_front(lambda points_ND: points_ND[:, :2], data_ND, np.random.default_rng(1))
    distance_SN = np.sqrt(((front_SD[:, None] - data_ND) ** 2).mean(axis=2))
    assert distance_SN.min(axis=1).max() < TRUST_RADIUS + 1e-9
    assert front_SD[:, 0].max() > data_ND[:, 0].max() + 0.2
    wide_SD = predicted_front(lambda points_ND: points_ND[:, :2], 3 * data_ND, np.random.default_rng(1))
    assert wide_SD.max() <= 1
    assert wide_SD.min() >= 0


@pytest.mark.parametrize("proposer_type", [Map, BayesianMap])
@pytest.mark.parametrize(("num_dimensions", "num_objectives"), [(4, 2), (8, 3)])
def test_fifteen_candidates_after_the_startup_cover_the_front(
    proposer_type: type[Map], num_dimensions: int, num_objectives: int
) -> None:
    """Against 400 points of the true front: of bowls of one shape, all between their peaks."""
    values = logit_quadratic(num_dimensions, num_objectives)
    proposer = proposer_type(problem(num_dimensions, num_objectives), proposer_type.options_type())
    points_ND = search(proposer, values, proposer.num_startup + 15)
    values_NM = np.array([values(point) for point in points_ND])
    shares = np.random.default_rng(0).dirichlet(np.ones(num_objectives), 400)
    peaks_MD = np.full((num_objectives, num_dimensions), 0.3)
    peaks_MD[np.arange(num_objectives), np.arange(num_objectives)] = 0.7
    front_NM = np.array([values(point) for point in shares @ peaks_MD])
    reference_M = front_NM.min(axis=0) - 0.1
    assert hypervolume(values_NM, reference_M) > 0.85 * hypervolume(front_NM, reference_M)
    startup = hypervolume(values_NM[: proposer.num_startup], reference_M)
    assert startup < 0.6 * hypervolume(front_NM, reference_M)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        (lambda point: np.array([1 / (1 + np.exp(8 * ((point - 0.6) ** 2).sum()))]), 0.6),  # a share
        (lambda point: np.array([-0.2 - 3 * ((point - 0.4) ** 2).sum()]), 0.4),  # minus a loss
        (lambda point: np.array([5 - 20 * ((point - 0.5) ** 2).sum()]), 0.5),  # neither
    ],
)
def test_one_objective_of_any_range_is_brought_to_its_peak(values: Callable[[Floats], Floats], best: float) -> None:
    points_ND = search(Map(problem(3, 1), MapOptions()), values, 20)
    values_N = np.array([values(point)[0] for point in points_ND])
    assert np.abs(points_ND[values_N.argmax()] - best).max() < 0.05


def test_floors_are_kept() -> None:
    """With x0 <= 0.3 asked for, the points of the front keep it, up to the error of the fit."""
    proposer = Map(problem(3, 1), MapOptions(num_startup=12))
    points_ND = search(proposer, lambda point: point[:1], 30, margins=lambda point: 0.3 - point[:1])
    assert (points_ND[12:, 0] <= 0.3 + 0.02).mean() > 0.6
    assert points_ND[12:, 0][points_ND[12:, 0] <= 0.3].max() > 0.28


def test_pending_candidates_share_the_front() -> None:
    """Ten asked at once lie apart, and together cover what ten asked one by one would."""
    values = logit_quadratic(4, 2)
    proposer = Map(problem(4), MapOptions())
    search(proposer, values, proposer.num_startup)
    asked_ND = np.array([candidate.point for candidate in proposer.ask(10, [])])
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(asked_ND) for b in asked_ND[:i]]
    assert min(gaps) > 0.01
    assert np.ptp(asked_ND[:, 0]) > 0.2


@pytest.mark.parametrize("proposer_type", [Map, BayesianMap])
def test_a_record_of_three_workers_replays_from_any_point(proposer_type: type[Map]) -> None:
    """Three candidates are always under way, and results come in any order: what is asked next is a fold over both."""
    values, rng = logit_quadratic(3, 2), np.random.default_rng(0)
    options = proposer_type.options_type(num_startup=8)
    proposer = proposer_type(problem(3), options)
    record: list[Candidate | Observation] = []
    pending: list[Observation] = []
    for index in range(24):
        (candidate,) = proposer.ask(1, [])
        record.append(candidate)
        point = np.array(candidate.point)
        pending.append(Observation(index=index, point=point, values_M=values(point)))
        while len(pending) > rng.integers(1, 5):
            record.append(pending.pop(rng.integers(len(pending))))
            proposer.tell(record[-1])
    for cut, asked in enumerate(record):
        if isinstance(asked, Observation):
            continue
        rebuilt = proposer_type(problem(3), options)
        for entry in record[:cut]:
            if isinstance(entry, Candidate):
                rebuilt.recall(entry)
            else:
                rebuilt.tell(entry)
        assert rebuilt.ask(1, []) == [asked]


def test_any_number_of_workers_gets_candidates_before_anything_is_told() -> None:
    for proposer in (Map(problem(3), MapOptions()), BayesianMap(problem(3), BayesianMapOptions())):
        asked = {candidate.point for candidate in proposer.ask(100, [])}
        assert len(asked) == 100


def test_a_point_that_failed_is_not_asked_again() -> None:
    """All that is near the peak fails: what is asked there next is always new."""
    proposer = Map(problem(2, 1), MapOptions(num_startup=12))
    points = []
    for index in range(40):
        (candidate,) = proposer.ask(1, [])
        point = np.array(candidate.point)
        failed = np.linalg.norm(point - 0.6) < 0.2
        values_M = None if failed else np.array([0.9 - ((point - 0.6) ** 2).sum()])
        proposer.tell(Observation(index=index, point=point, values_M=values_M))
        points.append(tuple(point))
    assert len(set(points)) == len(points)


def test_results_of_earlier_stages_take_the_startup_s_place() -> None:
    values = logit_quadratic(3, 2)
    points_ND = np.random.default_rng(0).random((30, 3))
    history = tuple(Observation(index=i, point=point, values_M=values(point)) for i, point in enumerate(points_ND))
    (candidate,) = Map(problem(3, history=history), MapOptions(num_startup=20)).ask(1, [])
    assert np.abs(np.array(candidate.point)[2] - 0.3) < 0.1  # the front lies in that plane


def test_more_numbers_than_a_quadratic_can_hold_are_refused() -> None:
    with pytest.raises(CampaignError, match="map searches 256 numbers at most, found 257; use coarser groups"):
        Map(problem(257), MapOptions())


@given(levels=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8))
def test_angles_and_direction_undo_each_other(levels: list[float]) -> None:
    vector_K = np.array(levels)
    np.testing.assert_allclose(direction(angles(vector_K[None])[0]), vector_K / np.linalg.norm(vector_K), atol=1e-9)


@pytest.mark.parametrize(("num_experts", "num_bins"), [(2, 4), (3, 16), (4, 8), (6, 32), (8, 32)])
def test_what_is_drawn_from_a_bin_lies_in_it(num_experts: int, num_bins: int) -> None:
    bins, rng = Bins(num_experts), np.random.default_rng(0)
    for chosen in range(num_bins):
        angles_J = bins.draw(chosen, rng)
        assert bins.of(0.5 * direction(angles_J)[None])[0] == chosen


def test_bins_that_err_most_are_likeliest_and_empty_ones_are_never_excluded() -> None:
    bins = Bins(2)
    told_N = np.array([0] * 10 + [1] * 10 + [2] * 10)
    errors_N = np.array([0.01] * 10 + [0.1] * 10 + [0.05] * 10)
    probability_B = bins.probabilities(errors_N, told_N, told_N)
    # Each bin holds one point more, with the mean error of all; a standard error falls with the root of the points.
    mean = 1.6 / 30
    mean_B = np.array([(0.1 + mean) / 11, (1.0 + mean) / 11, (0.5 + mean) / 11, mean])
    score_B = mean_B + 0.5 * errors_N.std() / np.sqrt([11, 11, 11, 1])
    weight_B = np.exp(score_B / score_B.max() / 0.07)
    np.testing.assert_allclose(probability_B, weight_B / weight_B.sum())
    assert probability_B.argmax() == 1
    assert probability_B[3] > probability_B[2]  # nothing is known there
    # Of two bins that err alike, the one with fewer points is the less certain; what is under way counts.
    alike_B = bins.probabilities(errors_N, np.array([0, 0, 1] * 10), np.array([0, 0, 1] * 10))
    assert alike_B[1] != alike_B[0]
    pending_B = bins.probabilities(errors_N, told_N, np.concatenate([told_N, [3] * 20]))
    assert pending_B[3] < probability_B[3]


def test_errors_of_zero_leave_all_bins_alike() -> None:
    probability_B = Bins(3).probabilities(np.zeros(4), np.array([0, 0, 1, 5]), np.array([0, 0, 1, 5]))
    np.testing.assert_allclose(probability_B, 1 / 16)


def test_bayesian_map_samples_where_the_surrogate_errs() -> None:
    """A cliff between expert 1 and the rest, which no quadratic follows: points gather on its side of the bins."""

    def values(point: Floats) -> Floats:
        smooth = 0.5 - 0.2 * point
        return smooth + (0.3 * np.sin(25 * point.sum()) if point[1] > 2 * point[0] else 0.0)

    counts = []
    for seed in range(4):
        proposer = BayesianMap(problem(2, seed=seed), BayesianMapOptions(num_startup=60, num_initial=20))
        points_ND = search(proposer, values, 60)[20:]
        counts.append((points_ND[:, 1] > 2 * points_ND[:, 0]).mean())
    assert np.mean(counts) > 0.5  # by chance: (pi/2 - atan 2) / (pi/2) = 0.3


def test_bayesian_map_keeps_to_the_published_radii() -> None:
    proposer = BayesianMap(problem(4), BayesianMapOptions(num_startup=30, num_initial=10))
    radii = np.linalg.norm(search(proposer, logit_quadratic(4, 2), 30)[10:], axis=1)
    assert 0.2 <= radii.min() < 0.4
    assert 0.6 < radii.max() <= 0.8


def test_merits_follow_what_was_measured() -> None:
    """Of shares with a logit-quadratic truth the surrogate is exact; what is missed of a floor counts tenfold."""
    values, points_ND = logit_quadratic(3, 2), np.random.default_rng(0).random((40, 3))
    observations = [
        Observation(index=i, point=x, values_M=values(x), margins_C=0.5 - x[:1]) for i, x in enumerate(points_ND)
    ]
    merits = Merits(observations)
    unseen_ND = np.random.default_rng(1).random((100, 3))
    missed_N = (unseen_ND[:, 0] - 0.5).clip(min=0)
    expected_NM = np.array([values(x) for x in unseen_ND]) - 10 * missed_N[:, None]
    np.testing.assert_allclose(merits(unseen_ND), expected_NM, atol=0.01)
    assert merits.squared_errors().max() < 0.01
