"""The process of losses and gradients: against the dense solution, and what a few points tell of a smooth loss.

Shape letters: N points, D dimensions, P points asked about.
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from evomerge.records import Floats
from evomerge.surrogates.slopes import _Known, fit_slopes


def dense(known: _Known, told: Floats, hyperparameters: Floats, points_PD: Floats) -> tuple[float, Floats]:
    """Minus the log of the evidence, up to a constant, and the expected losses: all N (1 + D) equations at once.

    The kernel's derivatives are written out element by element.
    """
    length, signal, error, slope_error = hyperparameters
    points_ND = known.points_ND
    num_points, num_dimensions = points_ND.shape

    def kernel(x: Floats, y: Floats) -> float:
        return float(signal**2 * np.exp(-((x - y) ** 2).sum() / (2 * length**2)))

    def entry(x: Floats, i: int | None, y: Floats, j: int | None) -> float:
        away, covariance = (x - y) / length**2, kernel(x, y)
        if i is None and j is None:
            return covariance
        if i is None:
            return covariance * away[j]
        if j is None:
            return -covariance * away[i]
        return covariance * ((i == j) / length**2 - away[i] * away[j])

    rows: list[tuple[Floats, int | None]] = [(x, None) for x in points_ND]
    rows += [(x, i) for x, i in product(points_ND, range(num_dimensions))]
    covariance = np.array([[entry(x, i, y, j) for y, j in rows] for x, i in rows])
    errors = [error**2 + 1e-8 * signal**2] * num_points + [slope_error**2] * (num_points * num_dimensions)
    covariance += np.diag(errors)
    ones = np.array([1.0 if i is None else 0.0 for _, i in rows])
    mean = (ones @ np.linalg.solve(covariance, told)) / (ones @ np.linalg.solve(covariance, ones))
    weights = np.linalg.solve(covariance, told - mean * ones)
    cross = np.array([[entry(x, None, y, j) for y, j in rows] for x in points_PD])
    loss = (told - mean * ones) @ weights / 2 + np.linalg.slogdet(covariance)[1] / 2
    return float(loss), mean + cross @ weights


def quadratic(num_dimensions: int, num_points: int, seed: int, noise: float = 0.0) -> tuple[Floats, ...]:
    """Points, losses and gradients of a random bowl, and its values at further points."""
    rng = np.random.default_rng(seed)
    root_DD = rng.standard_normal((num_dimensions, num_dimensions)) / num_dimensions**0.5
    center_D = rng.uniform(size=num_dimensions)

    def value(points: Floats) -> Floats:
        return np.asarray((((points - center_D) @ root_DD) ** 2).sum(axis=1))

    points_ND, asked_PD = rng.uniform(size=(num_points, num_dimensions)), rng.uniform(size=(40, num_dimensions))
    gradients_ND = 2 * (points_ND - center_D) @ root_DD @ root_DD.T
    gradients_ND += noise * rng.standard_normal(gradients_ND.shape)
    return points_ND, value(points_ND), gradients_ND, asked_PD, value(asked_PD)


@settings(max_examples=8)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**31 - 1))
def test_the_split_into_span_and_rest_is_exact(num_dimensions: int, num_points: int, seed: int) -> None:
    points_ND, losses_N, gradients_ND, asked_PD, _ = quadratic(num_dimensions, num_points, seed)
    known = _Known.of(points_ND, losses_N[:, None], gradients_ND[:, None])
    deviations = np.random.default_rng(seed).uniform(-0.5, 0.5, 4)
    hyperparameters = np.exp(known.typical + deviations)
    told = np.concatenate([losses_N, gradients_ND.ravel()]) / known.units_M
    expected, expected_P = dense(known, told, hyperparameters, asked_PD)
    _, (process,) = known.solve(deviations)
    expected_P *= known.units_M
    scale = np.abs(expected_P).max() + np.abs(losses_N).max()
    np.testing.assert_allclose(process.predict(asked_PD), expected_P, rtol=0, atol=1e-5 * scale)
    # The evidence up to the prior, as a difference to that of the typical hyperparameters.
    expected_there, _ = dense(known, told, np.exp(known.typical), asked_PD)
    prior = known.solve(deviations)[0] - known.solve(np.zeros(4))[0]
    penalty = ((deviations / np.array([0.2, 1.0, 1.0, 1.0])) ** 2).sum() / 2
    assert prior - penalty == pytest.approx(expected - expected_there, rel=1e-4, abs=1e-4)


def test_twelve_noisy_gradients_order_unseen_points() -> None:
    """In 32 dimensions, where 528 second derivatives are unknown; a mean over the seeds."""
    correlations = []
    for seed in range(5):
        points_ND, losses_N, gradients_ND, asked_PD, true_P = quadratic(32, 12, seed, noise=0.3)
        (process,) = fit_slopes(points_ND, losses_N[:, None], gradients_ND[:, None])
        correlations.append(spearmanr(process.predict(asked_PD), true_P).statistic)
    assert np.mean(correlations) > 0.8


def test_one_point_is_a_plane() -> None:
    points_ND, losses_N, gradients_ND, _, _ = quadratic(6, 1, 0)
    (process,) = fit_slopes(points_ND, losses_N[:, None], gradients_ND[:, None])
    step_D = 1e-3 * gradients_ND[0]
    up, down = process.predict(np.array([points_ND[0] + step_D, points_ND[0] - step_D]))
    assert up > down
    assert process.predict(points_ND)[0] == pytest.approx(losses_N[0], rel=1e-3)


def test_equal_losses_and_no_slopes_are_a_constant() -> None:
    (process,) = fit_slopes(np.eye(3), np.full((3, 1), 2.0), np.zeros((3, 1, 3)))
    np.testing.assert_allclose(process.predict(np.full((2, 3), 0.5)), 2.0)


def test_losses_of_other_units_are_told_as_if_alone() -> None:
    """Two losses, one of them in a thousand times smaller units and with an offset, are predicted alike."""
    points_ND, losses_N, gradients_ND, asked_PD, _ = quadratic(8, 6, 3)
    (alone,) = fit_slopes(points_ND, losses_N[:, None], gradients_ND[:, None])
    first, second = fit_slopes(
        points_ND,
        np.stack([losses_N, 1e3 * losses_N + 5], axis=1),
        np.stack([gradients_ND, 1e3 * gradients_ND], axis=1),
    )
    np.testing.assert_allclose(first.predict(asked_PD), alone.predict(asked_PD), rtol=1e-6)
    np.testing.assert_allclose((second.predict(asked_PD) - 5) / 1e3, alone.predict(asked_PD), rtol=1e-6)
