"""The Gaussian process: against formulas in plain numpy, finite differences, and what it must make of data."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from evomerge.surrogates import gp
from evomerge.surrogates.gp import GaussianProcess, fit, typical_logs


def matern(first: np.ndarray, second: np.ndarray, lengths: np.ndarray, signal: float) -> float:
    """Rasmussen and Williams 2006, eq. 4.17."""
    r = np.sqrt((((first - second) / lengths) ** 2).sum())
    return float(signal**2 * (1 + np.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-np.sqrt(5) * r))


def covariance(first: np.ndarray, second: np.ndarray, logs: np.ndarray, told: np.ndarray) -> float:
    """That of two points: the Matern kernel, and the quadratic one around the mean of the points told."""
    (signal, bowl), middle = np.exp(logs[-3:-1]), told.mean(axis=0)
    product = (first - middle) @ (second - middle) / ((told - middle) ** 2).sum(axis=1).mean()
    return matern(first, second, np.exp(logs[:-3]), signal) + float(bowl**2 * (product + product**2 / 2))


def test_mean_and_variance_are_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    points, asked, values = rng.random((12, 3)), rng.random((4, 3)), rng.normal(5, 2, 12)
    variances, logs = np.full(12, 0.1), np.log([0.5, 1.0, 2.0, 1.3, 0.7, 0.8])
    mean, scale = values.mean(), values.std()
    told = np.array([[covariance(a, b, logs, points) for b in points] for a in points])
    noise = np.exp(2 * logs[5]) * (variances / scale**2 + gp.LEAST_NOISE**2)
    told += np.diag(noise + gp.JITTER * np.exp(2 * logs[3]))
    cross = np.array([[covariance(a, b, logs, points) for b in points] for a in asked])
    own = np.array([covariance(a, a, logs, points) for a in asked])
    expected = mean + scale * cross @ np.linalg.inv(told) @ ((values - mean) / scale)
    variance = scale**2 * (own - np.einsum("pn,nm,pm->p", cross, np.linalg.inv(told), cross))
    process = GaussianProcess(points, values, variances, logs)
    np.testing.assert_allclose(process.mean(asked), expected, rtol=1e-9)
    np.testing.assert_allclose(process.predict(asked)[0], expected, rtol=1e-9)
    np.testing.assert_allclose(process.predict(asked)[1], variance, rtol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_the_posterior_is_that_of_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, values = rng.random((16, 4)), rng.normal(size=16)
    told = (values, points, gp._bowl(points, points), np.full(16, 0.01), typical_logs(4))
    logs = typical_logs(4) + rng.normal(0, 0.7, 7)
    numeric = approx_fprime(logs, lambda logs: gp._loss(logs, *told)[0], 1e-6)
    np.testing.assert_allclose(gp._loss(logs, *told)[1], numeric, rtol=1e-3, atol=1e-3)


def test_exact_values_are_met_and_noisy_ones_are_smoothed() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((30, 2))
    values = np.sin(4 * points[:, 0]) + points[:, 1]
    exact = fit(points, values, np.zeros(30))
    assert np.abs(exact.mean(points) - values).max() < 0.02
    noisy = values + rng.normal(0, 0.3, 30)
    smoothed = fit(points, noisy, np.full(30, 0.09))
    assert np.abs(smoothed.mean(points) - values).mean() < 0.6 * np.abs(noisy - values).mean()


def test_a_dimension_that_does_not_matter_gets_a_greater_length() -> None:
    rng = np.random.default_rng(2)
    points = rng.random((60, 3))
    lengths = np.exp(fit(points, np.sin(6 * points[:, 1]), np.zeros(60)).logs[:3])
    assert lengths[1] < 0.5 * min(lengths[0], lengths[2])


def test_few_points_tell_the_one_length_that_dimensions_share() -> None:
    """A function that is rough in all of twelve dimensions, and one that is smooth in all, each told at 30 points."""
    rng = np.random.default_rng(8)
    points = rng.random((30, 12))
    smooth, rough = (
        fit(points, np.sin(frequency * points).sum(axis=1), np.zeros(30)).logs[:12] for frequency in (1.0, 9.0)
    )
    assert smooth.min() > rough.max()
    assert max(np.ptp(smooth), np.ptp(rough)) < 1.0


def test_few_points_in_many_dimensions_predict_better_than_their_mean() -> None:
    rng = np.random.default_rng(3)
    slope = rng.normal(size=64)
    points, asked = rng.random((40, 64)), rng.random((100, 64))
    process = fit(points, points @ slope, np.zeros(40))
    assert np.corrcoef(process.mean(asked), asked @ slope)[0, 1] > 0.5


def test_equal_values_are_no_trouble() -> None:
    process = fit(np.random.default_rng(4).random((5, 2)), np.full(5, 0.7), np.zeros(5))
    assert process.mean(np.zeros((3, 2))) == pytest.approx([0.7] * 3)


def test_a_few_steps_from_an_earlier_fit_are_as_good_as_many() -> None:
    rng = np.random.default_rng(5)
    points = rng.random((50, 4))
    values = np.sin(3 * points[:, 0]) * points[:, 1]
    earlier = fit(points[:40], values[:40], np.zeros(40))
    few, many = (fit(points, values, np.zeros(50), *how) for how in ((earlier.logs, 8), (None, 60)))
    asked = rng.random((50, 4))
    truth = np.sin(3 * asked[:, 0]) * asked[:, 1]
    errors = [np.abs(process.mean(asked) - truth).mean() for process in (few, many)]
    assert errors[0] < 1.5 * errors[1] + 0.01


def test_what_is_left_out_is_what_the_other_points_say() -> None:
    """The closed form agrees with leaving each point out, and predicting it from the others by the same lengths."""
    rng = np.random.default_rng(3)
    points, variances, logs = rng.random((8, 2)), np.full(8, 0.01), np.log([0.8, 1.5, 1.1, 0.6, 0.9])
    values = np.sin(3 * points[:, 0]) + points[:, 1]
    mean, scale = values.mean(), values.std()
    kernel = np.array([[covariance(a, b, logs, points) for b in points] for a in points])
    noise = np.exp(2 * logs[4]) * (variances / scale**2 + gp.LEAST_NOISE**2)
    noisy = kernel + np.diag(noise + gp.JITTER * np.exp(2 * logs[2]))
    means, left_variances = GaussianProcess(points, values, variances, logs).left_out()
    for n in range(8):
        others = np.arange(8) != n
        weights = np.linalg.solve(noisy[np.ix_(others, others)], kernel[others, n])
        assert means[n] == pytest.approx(mean + weights @ (values[others] - mean))
        assert left_variances[n] == pytest.approx(scale**2 * (noisy[n, n] - weights @ kernel[others, n]))


def test_a_bowl_is_told_by_few_points_with_errors() -> None:
    """Far from where it was told, a quadratic is known far better than by lengths alone."""
    rng = np.random.default_rng(9)
    bowl = lambda points: (points - 0.4) ** 2 @ np.array([1.0, 2.0, 3.0, 4.0])  # noqa: E731
    points, asked = 0.2 + 0.4 * rng.random((40, 4)), rng.random((100, 4))
    values = bowl(points) + rng.normal(0, 0.03, 40)
    process = fit(points, values, np.full(40, 0.03**2))
    without = GaussianProcess(points, values, process.variances_N, process.logs - 9 * (np.arange(7) == 5))
    off, off_without = (np.abs(model.mean(asked) - bowl(asked)).mean() for model in (process, without))
    assert off < 0.5 * off_without


def test_errors_that_are_twice_what_is_known_are_found() -> None:
    rng = np.random.default_rng(10)
    points = rng.random((80, 3))
    process = fit(points, points.sum(axis=1) + rng.normal(0, 0.1, 80), np.full(80, 0.05**2))
    assert np.exp(process.logs[-1]) == pytest.approx(2, rel=0.2)


def test_fewer_points_than_a_quadratic_has_unknowns_say_nothing_of_it() -> None:
    rng = np.random.default_rng(11)
    points, values, asked = rng.random((14, 4)), rng.random(14), rng.random((9, 4))
    logs = typical_logs(4)
    with_it, without = (
        GaussianProcess(points, values, np.zeros(14), logs - off * (np.arange(7) == 5)) for off in (0, 9)
    )
    for ours, theirs in zip(with_it.predict(asked), without.predict(asked), strict=True):
        np.testing.assert_array_equal(ours, theirs)
