"""What a descent learned on its way: a Gaussian process told losses and their gradients, both with errors.

A descent takes the gradient of every objective's loss at every step, whatever it does with them. Some twenty points
with gradients in all D dimensions tell more of a smooth loss than hundreds of values, and they are paid for already.
The kernel is the squared exponential with one length for all dimensions: gradients say by themselves which dimensions
matter. Reference: Rasmussen and Williams 2006, section 9.4; Eriksson et al. 2018, arxiv.org/abs/1810.12283.

Exact for any D: covariances of gradients couple directions only within the span of the differences between the N
points, of rank R < N. Outside of it every direction is a process of its own, with one N x N covariance for all. So it
costs O(N^3 R^3 + N^2 D) where a dense solution costs O(N^3 D^3).
Shape letters: N points with gradients, M losses, D dimensions, R directions of the span, P points asked about.
"""

from dataclasses import dataclass

import numpy as np

from evomerge.records import Floats

TYPICAL_LENGTH = 0.7  # in one dimension; times the square root of D
TYPICAL_ERROR = 0.1  # of losses and slopes, in standard deviations of theirs
SPREADS = np.array([0.2, 1.0, 1.0, 1.0])  # of the logarithms of length, signal and both errors about what is typical
NUM_TRIALS = 80  # of hyperparameters
JITTER = 1e-8


@dataclass(frozen=True, slots=True)
class SlopeProcess:
    """A fitted process: mean + sum_n (value_n k(x, x_n) + gradient_n . d k(x, x_n) / d x_n)."""

    points_ND: Floats
    length: float
    mean: float
    by_value_N: Floats
    by_slope_ND: Floats

    def predict(self, points_PD: Floats) -> Floats:
        """Return the expected losses, (P,)."""
        kernel_PN = _kernel(points_PD, self.points_ND, self.length)
        along_PN = points_PD @ self.by_slope_ND.T - (self.points_ND * self.by_slope_ND).sum(axis=1)
        expected_P: Floats = self.mean + (kernel_PN * (self.by_value_N + along_PN / self.length**2)).sum(axis=1)
        return expected_P


def fit_slopes(points_ND: Floats, losses_NM: Floats, gradients_NMD: Floats) -> list[SlopeProcess]:
    """Fit length, signal and errors by maximum a posteriori to losses (N, M) and gradients (N, M, D) at points (N, D).

    Returns one process for each of M losses. The four numbers are the same for all of them, in units of each one's own
    slopes: one factorization serves all. The same points and items tell of all losses, so that their evidence counts as
    that of one, by its mean. (Measured: predictions as good as with four numbers of each loss's own.)
    """
    from scipy.optimize import minimize

    known = _Known.of(points_ND, losses_NM, gradients_NMD)
    found = minimize(
        lambda logs: known.solve(logs)[0],
        np.zeros(4),
        method="Nelder-Mead",
        options={"maxfev": NUM_TRIALS, "initial_simplex": np.vstack([np.zeros(4), np.eye(4)])},
    )
    return known.solve(found.x)[1]


@dataclass(frozen=True, slots=True)
class _Known:
    """The data, in units of their own, rotated into the span of the points' differences and what is outside of it."""

    points_ND: Floats
    span_DR: Floats
    inside_NR: Floats
    losses_NM: Floats
    slopes_NRM: Floats
    outside_NMD: Floats
    units_M: Floats
    typical: Floats

    @classmethod
    def of(cls, points_ND: Floats, losses_NM: Floats, gradients_NMD: Floats) -> "_Known":
        _, energy_R, span_RD = np.linalg.svd(points_ND - points_ND.mean(axis=0), full_matrices=False)
        span_DR = span_RD[energy_R > 1e-9 * max(energy_R[0], 1e-30)].T
        length = TYPICAL_LENGTH * points_ND.shape[1] ** 0.5
        units_M = length * np.sqrt((gradients_NMD**2).mean(axis=(0, 2))).clip(min=1e-12)
        losses_NM, gradients_NMD = losses_NM / units_M, gradients_NMD / units_M[:, None]
        slopes_NMR = gradients_NMD @ span_DR
        spread = max(float(np.sqrt(losses_NM.var(axis=0).mean())), 1e-12)
        return cls(
            points_ND, span_DR, points_ND @ span_DR, losses_NM, slopes_NMR.swapaxes(1, 2),
            gradients_NMD - slopes_NMR @ span_DR.T, units_M,
            np.log([length, 1.0, TYPICAL_ERROR * spread, TYPICAL_ERROR / length]),
        )  # fmt: skip

    def solve(self, deviations: Floats) -> tuple[float, list[SlopeProcess]]:
        """Return minus the log of the posterior at ``typical`` plus deviations, and the processes."""
        from scipy.linalg import cho_solve

        length, signal, error, slope_error = np.exp(self.typical + deviations)
        num_points, rank = self.inside_NR.shape
        num_losses = len(self.units_M)
        kernel_NN = signal**2 * _kernel(self.inside_NR, self.inside_NR, length)
        away_NNR = (self.inside_NR[:, None] - self.inside_NR) / length**2
        crossed_NRN = (kernel_NN[:, :, None] * away_NNR).transpose(1, 2, 0)  # slope at the first, value at the second
        curved = kernel_NN[:, None, :, None] * (
            np.eye(rank)[:, None, :] / length**2 - away_NNR.transpose(0, 2, 1)[:, :, :, None] * away_NNR[:, None]
        )
        size = num_points * rank
        covariance = np.empty((num_points + size, num_points + size))
        covariance[:num_points, :num_points] = kernel_NN + (error**2 + JITTER * signal**2) * np.eye(num_points)
        covariance[num_points:, :num_points] = crossed_NRN.reshape(size, num_points)
        covariance[:num_points, num_points:] = covariance[num_points:, :num_points].T
        covariance[num_points:, num_points:] = curved.reshape(size, size) + slope_error**2 * np.eye(size)
        outer_NN = kernel_NN / length**2 + slope_error**2 * np.eye(num_points)
        try:
            factor, outer = np.linalg.cholesky(covariance), np.linalg.cholesky(outer_NN)
        except np.linalg.LinAlgError:
            return 1e10, []
        told = np.concatenate([self.losses_NM, self.slopes_NRM.reshape(size, num_losses)])
        ones = np.concatenate([np.ones(num_points), np.zeros(size)])
        weighted, of_ones = cho_solve((factor, True), told), cho_solve((factor, True), ones)
        mean_M = (ones @ weighted) / (ones @ of_ones)
        weighted = weighted - np.outer(of_ones, mean_M)
        outside_NMD = cho_solve((outer, True), self.outside_NMD.reshape(num_points, -1)).reshape(self.outside_NMD.shape)
        misfit = ((told - np.outer(ones, mean_M)) * weighted).sum() + (self.outside_NMD * outside_NMD).sum()
        num_outside = self.points_ND.shape[1] - rank
        logdet = np.log(np.diag(factor)).sum() + num_outside * np.log(np.diag(outer)).sum()
        inside_NMR = weighted[num_points:].reshape(num_points, rank, num_losses).swapaxes(1, 2)
        by_slope_NMD = inside_NMR @ self.span_DR.T + outside_NMD
        processes = [
            SlopeProcess(
                self.points_ND,
                length,
                unit * mean_M[m],
                unit * signal**2 * weighted[:num_points, m],
                unit * signal**2 * by_slope_NMD[:, m],
            )
            for m, unit in enumerate(self.units_M)
        ]
        loss = misfit / (2 * num_losses) + logdet + ((deviations / SPREADS) ** 2).sum() / 2
        return float(loss), processes


def _kernel(points_PD: Floats, points_ND: Floats, length: float) -> Floats:
    squared_PN = (points_PD**2).sum(axis=1)[:, None] + (points_ND**2).sum(axis=1) - 2 * points_PD @ points_ND.T
    return np.asarray(np.exp(-squared_PN.clip(min=0.0) / (2 * length**2)))
