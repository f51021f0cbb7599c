"""Shape letters: N points, M objectives, D dimensions, T experts."""

import warnings

import numpy as np
import pytest
from scipy.optimize import OptimizeWarning, curve_fit

from evomerge.records import Floats
from evomerge.surrogates.link import Identity, Link, Sigmoid, Softplus
from evomerge.surrogates.quadratic import Quadratic, fit


def truth(num_dimensions: int, links: tuple[Link, ...], seed: int) -> Quadratic:
    """Concave quadratics that rise along some experts and fall along others."""
    rng = np.random.default_rng(seed)
    shape = (len(links), num_dimensions)
    root_MDD = rng.standard_normal((*shape, num_dimensions))
    return Quadratic(
        links=links,
        curvature_MDD=-2.0 / num_dimensions * root_MDD @ root_MDD.transpose(0, 2, 1),
        slope_MD=0.5 + 1.5 * rng.standard_normal(shape),
        offset_M=-0.5 + 0.5 * rng.standard_normal(len(links)),
        left_out_NM=np.zeros((0, len(links))),
    )


def grid_sample(num_experts: int, rng: np.random.Generator) -> Floats:
    """MAP's law, written down plainly: every expert alone, and a random part of a regular grid."""
    num_points = (num_experts + 1) * (num_experts + 2)
    levels = np.linspace(0, 1, int(np.ceil((2 * (num_points - num_experts)) ** (1 / num_experts))))
    grid = np.array(np.meshgrid(*[levels] * num_experts)).reshape(num_experts, -1).T
    kept = [point for point in grid if abs(point.sum() - 1) > 1e-9 and np.ptp(point) > 0]
    return np.vstack([np.eye(num_experts), rng.permutation(kept)[: num_points - num_experts]])


def error(surrogate: Quadratic, true: Quadratic) -> float:
    points_ND = np.random.default_rng(99).random((1000, true.slope_MD.shape[1]))
    return float(np.abs(surrogate.values(points_ND) - true.values(points_ND)).mean())


@pytest.mark.parametrize("refine", [False, True])
def test_a_quadratic_is_recovered_behind_every_link(refine: bool) -> None:
    true = truth(4, (Identity(), Sigmoid(), Softplus()), seed=0)
    points_ND = np.random.default_rng(1).random((40, 4))
    found = fit(points_ND, true.values(points_ND), true.links, ridges=(1e-9,), refine=refine)
    np.testing.assert_allclose(found.curvature_MDD, true.curvature_MDD, atol=1e-4)
    np.testing.assert_allclose(found.slope_MD, true.slope_MD, atol=1e-4)
    np.testing.assert_allclose(found.offset_M, true.offset_M, atol=1e-4)


def test_predictions_are_those_of_the_formula() -> None:
    true = truth(3, (Sigmoid(), Softplus()), seed=1)
    point_D = np.array([0.2, 0.7, 0.4])
    for m, link in enumerate(true.links):
        predictor = point_D @ true.curvature_MDD[m] @ point_D / 2 + true.slope_MD[m] @ point_D + true.offset_M[m]
        assert true.values(point_D[None])[0, m] == pytest.approx(float(link.forward(np.array(predictor))))


@pytest.mark.parametrize("num_experts", [3, 4, 6])
def test_ridge_finds_what_an_all_ones_start_does_not(num_experts: int) -> None:
    """Logit-quadratic truth, noise 0.005, MAP's own sample; the published start has 1 before every monomial.

    Known for other truths of this kind: 0.14 to 0.45 from that start, 0.004 to 0.018 by ridge.
    """
    first_Q, second_Q = np.triu_indices(num_experts)

    def published(points_ND: Floats, *numbers: float) -> Floats:
        curved_N = (points_ND[:, first_Q] * points_ND[:, second_Q]) @ np.array(numbers[: len(first_Q)])
        return Sigmoid().forward(curved_N + points_ND @ np.array(numbers[len(first_Q) : -1]) + numbers[-1])

    from_ones, from_ridge = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        true = truth(num_experts, (Sigmoid(),), seed)
        points_ND = grid_sample(num_experts, rng)
        values_NM = np.clip(true.values(points_ND) + 0.005 * rng.standard_normal((len(points_ND), 1)), 0, 1)
        from_ridge.append(error(fit(points_ND, values_NM, true.links), true))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            ones = np.ones(len(first_Q) + num_experts + 1)
            numbers, _ = curve_fit(published, points_ND, values_NM[:, 0], p0=ones, maxfev=20_000)
        held_out_ND = np.random.default_rng(99).random((1000, num_experts))
        from_ones.append(np.abs(published(held_out_ND, *numbers) - true.values(held_out_ND)[:, 0]).mean())
    assert np.mean(from_ridge) < 0.02
    assert np.mean(from_ones) > 0.1


@pytest.mark.parametrize("num_points", [8, 60])
def test_left_out_values_are_those_of_fits_without_the_point(num_points: int) -> None:
    """Against one linear solve a point, with fewer points than unknowns and with more."""
    rng = np.random.default_rng(4)
    points_ND, values_N, ridge = rng.random((num_points, 3)), rng.random(num_points), 0.03
    found = fit(points_ND, values_N[:, None], (Identity(),), ridges=(ridge,))
    x_ND = 2 * points_ND - 1
    products = [x_ND[:, i] * x_ND[:, j] * (0.5 if i == j else 0.5**0.5) for i in range(3) for j in range(i, 3)]
    features_NP = np.column_stack([np.ones(num_points), x_ND, *products])
    damping_PP = ridge * (features_NP**2).sum() / 10 * np.eye(10)
    for left_out in range(num_points):
        rest = np.arange(num_points) != left_out
        normal_PP = features_NP[rest].T @ features_NP[rest] + damping_PP
        solved_P = np.linalg.solve(normal_PP, features_NP[rest].T @ (values_N - values_N.mean())[rest])
        predicted = values_N.mean() + features_NP[left_out] @ solved_P
        assert found.left_out_NM[left_out, 0] == pytest.approx(predicted, abs=1e-8)


def test_of_several_ridges_each_objective_takes_its_own() -> None:
    """Noise alone wants the strongest; an exact quadratic the weakest."""
    rng = np.random.default_rng(5)
    true = truth(4, (Identity(), Identity()), seed=5)
    points_ND = rng.random((30, 4))
    values_NM = true.values(points_ND)
    values_NM[:, 1] = rng.standard_normal(30)
    found = fit(points_ND, values_NM, true.links, ridges=(1e-4, 100.0))
    np.testing.assert_allclose(found.curvature_MDD[0], true.curvature_MDD[0], atol=0.05)
    assert np.abs(found.curvature_MDD[1]).max() < 0.1


def test_refinement_weighs_points_as_their_noise_does() -> None:
    """Counts of 400 items: near 0 and 1, the log-odds are the noisiest, and the ridge fit believes them as much."""
    before, after = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        true = truth(6, (Sigmoid(1 / 800),), seed)
        points_ND = rng.random((56, 6))
        values_NM = rng.binomial(400, true.values(points_ND)) / 400
        before.append(error(fit(points_ND, values_NM, true.links), true))
        after.append(error(fit(points_ND, values_NM, true.links, refine=True), true))
    assert np.mean(after) < 0.8 * np.mean(before)


def test_in_64_dimensions_100_points_rank_unseen_ones() -> None:
    """2145 unknowns: the fit of the least norm takes its place, and still ranks what it has not seen."""
    rng = np.random.default_rng(6)
    root_DD = rng.standard_normal((64, 64)) / 64
    true = Quadratic(
        (Sigmoid(),), -(root_DD @ root_DD.T)[None], 0.25 * rng.standard_normal((1, 64)), np.zeros(1), np.zeros((0, 1))
    )
    points_ND, unseen_ND = rng.random((100, 64)), rng.random((500, 64))
    found = fit(points_ND, true.values(points_ND), true.links, ridges=(1e-4, 1e-2, 1.0))
    assert np.corrcoef(found.values(unseen_ND)[:, 0], true.values(unseen_ND)[:, 0])[0, 1] > 0.8


def test_values_out_of_a_links_range_are_refused() -> None:
    with pytest.raises(ValueError, match="expected numbers in"):
        fit(np.zeros((2, 1)), np.array([[0.5], [1.5]]), (Sigmoid(),))
