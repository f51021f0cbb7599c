"""An exact Gaussian process over [0, 1]^D: Matern-5/2 beside a quadratic, fitted by maximum a posteriori.

    k(x, y) = signal^2 matern(|(x - y) / lengths|) + bowl^2 (u'v + (u'v)^2 / 2)

u and v are x and y about the mean of the points told, in units of their root mean square distance from it.
Near its best, a smooth objective is a quadratic, which few points with errors tell, where a process of lengths alone
has to learn it place by place. How much of a quadratic there is, the data say; while they are fewer than its unknowns
they cannot, and the second kernel is left out: on fronts that sag it would lead astray (measured).
Reference: Rasmussen and Williams 2006, chapters 2, 4.2 and 5.4. The lengths' prior grows with the square root of D, so
that in many dimensions each hardly matters until the data say so (Hvarfner, Hellsten and Nardi 2024,
arxiv.org/abs/2402.02229). A search has tens of points, not hundreds, which tell one length well and D of them badly: so
the prior lets all lengths differ from what is typical by one factor, and each by much less of its own. In the same way
it knows how large errors are but for a factor.
Shape letters: N points with values, D dimensions, P points asked about.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evomerge.records import Floats

ROOT5 = 5**0.5
JITTER = 1e-6  # of the signal's variance
TYPICAL_LENGTH = 1.5  # in one dimension; times the square root of D
TYPICAL_BOWL = 0.5  # standard deviation over the points told, in those of the values
LEAST_NOISE = 0.01  # beside the errors that are known, in standard deviations of the values
SPREAD = 1.0  # of the logarithms of signal, bowl, and the factors of errors and lengths about what is typical
OWN_SPREAD = 0.3  # of the logarithm of what a length has beyond that factor


@dataclass(frozen=True, slots=True)
class GaussianProcess:
    """A fitted process. values (N,) at points (N, D); variances (N,): of what is known of their errors.

    logs (D + 3,): logarithms of the lengths, of the standard deviations of signal and bowl, in those of the values, and
    of the factor by which errors differ from what is known of them.
    """

    points_ND: Floats
    values_N: Floats
    variances_N: Floats
    logs: Floats
    _mean: float = field(init=False)
    _scale: float = field(init=False)
    _rates_D: Floats = field(init=False)
    _told_EN: Floats = field(init=False)
    _factor_NN: Floats = field(init=False)
    _weights_N: Floats = field(init=False)

    def __post_init__(self) -> None:
        mean, scale = _standard(self.values_N)
        rates_D = _rates(self.logs)
        scaled_ND = self.points_ND * rates_D
        told_EN = _beside(scaled_ND)
        matern_NN = _matern(_squares(scaled_ND, told_EN))
        kernel_NN = _covariance(self.logs, matern_NN, _bowl(self.points_ND, self.points_ND))
        factor_NN = _factor(_noisy(kernel_NN, self.logs, self.variances_N / scale**2))
        for name, value in {
            "_mean": mean,
            "_scale": scale,
            "_rates_D": rates_D,
            "_told_EN": told_EN,
            "_factor_NN": factor_NN,
            "_weights_N": _solve(factor_NN, (self.values_N - mean) / scale),
        }.items():
            object.__setattr__(self, name, value)

    def mean(self, points_PD: Floats) -> Floats:
        """Return the expected values, (P,)."""
        return self._mean + self._scale * (self._kernel(points_PD) @ self._weights_N)

    def predict(self, points_PD: Floats) -> tuple[Floats, Floats]:
        """Return the expected values and the variances of the process, without noise, (P,) each."""
        from scipy.linalg import solve_triangular

        kernel_PN = self._kernel(points_PD)
        explained_NP = solve_triangular(self._factor_NN, kernel_PN.T, lower=True, check_finite=False)
        own_P = _covariance(self.logs, np.ones(len(points_PD)), _own_bowl(points_PD, self.points_ND))
        variance_P = own_P - np.einsum("np,np->p", explained_NP, explained_NP)
        mean_P = self._mean + self._scale * (kernel_PN @ self._weights_N)
        return mean_P, self._scale**2 * variance_P.clip(min=1e-12)

    def _kernel(self, points_PD: Floats) -> Floats:
        """Return the covariances with the points, (P, N)."""
        matern_PN = _matern(_squares(points_PD * self._rates_D, self._told_EN))
        return _covariance(self.logs, matern_PN, _bowl(points_PD, self.points_ND))

    def left_out(self) -> tuple[Floats, Floats]:
        """Return what all other points say of each point's value, (N,): means and variances, noise included.

        The lengths stay those of the fit to all points. Reference: Rasmussen and Williams 2006, 5.4.2.
        """
        precision_N = np.diag(_inverse(self._factor_NN))
        return self.values_N - self._scale * self._weights_N / precision_N, self._scale**2 / precision_N


def fit(
    points_ND: Floats, values_N: Floats, variances_N: Floats, start: Floats | None = None, num_steps: int = 40
) -> GaussianProcess:
    """Fit the logs; variances_N are 0 where a value is exact.

    start: the logs of an earlier fit, from which a few steps are enough. The logs found are rounded, as a search that
    is resumed knows them from its record.
    """
    from scipy.optimize import minimize

    typical = typical_logs(points_ND.shape[1])
    mean, scale = _standard(values_N)
    found = minimize(
        _loss,
        typical if start is None else start,
        ((values_N - mean) / scale, points_ND, _bowl(points_ND, points_ND), variances_N / scale**2, typical),
        jac=True,
        method="L-BFGS-B",
        bounds=[(log - 4 * SPREAD, log + 4 * SPREAD) for log in typical],
        options={"maxiter": num_steps},
    )
    return GaussianProcess(points_ND, values_N, variances_N, found.x.round(6))


def typical_logs(num_dimensions: int) -> Floats:
    """Return the logs where the priors are centred, (D + 3,)."""
    lengths_D = np.full(num_dimensions, TYPICAL_LENGTH * num_dimensions**0.5)
    return np.asarray(np.log(np.concatenate([lengths_D, [1.0, TYPICAL_BOWL, 1.0]])))


def _loss(
    logs: Floats, values_N: Floats, points_ND: Floats, bowl_NN: Floats | None, variances_N: Floats, typical: Floats
) -> tuple[float, Any]:
    """Return minus the log of the posterior and its gradient, in closed form."""
    signal_variance, bowl_variance = np.exp(2 * logs[-3:-1])
    scaled_ND = points_ND * _rates(logs)
    distance_NN = np.sqrt(_squares(scaled_ND, _beside(scaled_ND)))
    decay_NN = np.exp(-distance_NN)
    matern_NN = (1 + distance_NN + distance_NN**2 / 3) * decay_NN
    try:
        factor_NN = _factor(_noisy(_covariance(logs, matern_NN, bowl_NN), logs, variances_N))
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(logs)
    weights_N = _solve(factor_NN, values_N)
    deviations = logs - typical
    pulls = _pulls(deviations)
    loss = values_N @ weights_N / 2 + np.log(np.diag(factor_NN)).sum() + deviations @ pulls / 2
    pull_NN = np.outer(weights_N, weights_N) - _inverse(factor_NN)
    slope_NN = pull_NN * (signal_variance / 3) * (1 + distance_NN) * decay_NN
    # sum_ab slope_ab (x_a - x_b)^2 = 2 (sum_a x_a^2 slope_a. - x' slope x), in each dimension
    by_length_D = (slope_NN.sum(axis=1) @ scaled_ND**2) - (scaled_ND * (slope_NN @ scaled_ND)).sum(axis=0)
    own_N = np.diag(pull_NN)
    by_signal = signal_variance * (np.vdot(pull_NN, matern_NN) + JITTER * own_N.sum())
    by_bowl = 0.0 if bowl_NN is None else bowl_variance * np.vdot(pull_NN, bowl_NN)
    by_noise = np.exp(2 * logs[-1]) * (own_N @ (variances_N + LEAST_NOISE**2))
    gradient = -np.concatenate([by_length_D, [by_signal, by_bowl, by_noise]]) + pulls
    return float(loss), gradient


def _pulls(deviations: Floats) -> Floats:
    """Return the prior's precision times deviations of logs, (D + 3,).

    The covariance of the lengths' is OWN_SPREAD^2 I + SPREAD^2 11', whose inverse is that of Sherman and Morrison.
    """
    own_D = deviations[:-3]
    shared = SPREAD**2 * own_D.sum() / (OWN_SPREAD**2 + SPREAD**2 * len(own_D))
    return np.concatenate([(own_D - shared) / OWN_SPREAD**2, deviations[-3:] / SPREAD**2])


def _standard(values_N: Floats) -> tuple[float, float]:
    """Return mean and standard deviation; 1 where all values are equal."""
    scale = float(values_N.std())
    return float(values_N.mean()), scale if scale > 1e-12 else 1.0


def _noisy(kernel_NN: Floats, logs: Floats, variances_N: Floats) -> Floats:
    noise_N = np.exp(2 * logs[-1]) * (variances_N + LEAST_NOISE**2) + JITTER * np.exp(2 * logs[-3])
    return kernel_NN + np.diag(noise_N)


def _covariance(logs: Floats, matern: Floats, bowl: Floats | None) -> Floats:
    """Return the sum of both kernels, of any shape."""
    signal_variance, bowl_variance = np.exp(2 * logs[-3:-1])
    covariance = signal_variance * matern
    if bowl is not None:
        covariance += bowl_variance * bowl
    return np.asarray(covariance)


def _bowl(points_PD: Floats, told_ND: Floats) -> Floats | None:
    """Return the kernel of slopes and curvatures around the mean of the points told, (P, N); None while left out."""
    if _is_undetermined(told_ND):
        return None
    middle_D = told_ND.mean(axis=0)
    away_ND = told_ND - middle_D
    return _quadratic((points_PD - middle_D) @ away_ND.T, away_ND)


def _own_bowl(points_PD: Floats, told_ND: Floats) -> Floats | None:
    """Return its value of each point with itself, (P,); None while left out."""
    if _is_undetermined(told_ND):
        return None
    middle_D = told_ND.mean(axis=0)
    return _quadratic(((points_PD - middle_D) ** 2).sum(axis=1), told_ND - middle_D)


def _is_undetermined(told_ND: Floats) -> bool:
    """Whether there are fewer points than a quadratic has unknowns."""
    num_points, num_dimensions = told_ND.shape
    return bool(num_points < (num_dimensions + 1) * (num_dimensions + 2) // 2)


def _quadratic(products: Floats, away_ND: Floats) -> Floats:
    products = products / max((away_ND**2).sum() / len(away_ND), 1e-12)
    return np.asarray(products + products**2 / 2)


def _rates(logs: Floats) -> Floats:
    """Return by what points are multiplied for distances in units of length / sqrt(5), (D,)."""
    return np.asarray(ROOT5 / np.exp(logs[:-3]))


def _matern(squares_PN: Floats) -> Floats:
    """Return the correlations at squared distances, which are overwritten."""
    kernel_PN = squares_PN / 3
    distance_PN = np.sqrt(squares_PN, out=squares_PN)
    kernel_PN += distance_PN
    kernel_PN += 1
    kernel_PN *= np.exp(np.negative(distance_PN, out=distance_PN), out=distance_PN)
    return kernel_PN


def _beside(scaled_ND: Floats) -> Floats:
    """Return what makes one product of squared distances to these points, (D + 2, N): see ``_squares``."""
    squares_N = np.einsum("nd,nd->n", scaled_ND, scaled_ND)
    return np.vstack([-2 * scaled_ND.T, squares_N, np.ones(len(scaled_ND))])


def _squares(scaled_PD: Floats, told_EN: Floats) -> Floats:
    """Return |x|^2 + |y|^2 - 2 x'y as the product of (x, 1, |x|^2) and (-2 y, |y|^2, 1), (P, N)."""
    num_points, num_dimensions = scaled_PD.shape
    lifted_PE = np.ones((num_points, num_dimensions + 2))
    lifted_PE[:, :-2] = scaled_PD
    np.einsum("pd,pd->p", scaled_PD, scaled_PD, out=lifted_PE[:, -1])
    squares_PN = lifted_PE @ told_EN
    return np.maximum(squares_PN, 0.0, out=squares_PN)


def _factor(covariance_NN: Floats) -> Floats:
    return np.asarray(np.linalg.cholesky(covariance_NN), dtype=np.float64)


def _solve(factor_NN: Floats, right: Floats) -> Floats:
    from scipy.linalg import cho_solve

    solved: Floats = cho_solve((factor_NN, True), right, check_finite=False)
    return solved


def _inverse(factor_NN: Floats) -> Floats:
    """Return the inverse of the matrix with this lower factor: a third of what solving for each column takes."""
    from scipy.linalg.lapack import dpotri

    upper_NN: Floats = dpotri(factor_NN.T)[0]  # and 0 below the diagonal, as the factor has it
    inverse_NN = upper_NN + upper_NN.T
    np.einsum("nn->n", inverse_NN)[:] /= 2
    return inverse_NN
