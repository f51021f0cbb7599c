"""The quadratic surrogate: link(c'Ac/2 + b'c + e) for every objective.

Reference: MAP, arxiv.org/abs/2406.07529: a second-order Taylor expansion of each metric behind a link. Departure: the
fit begins with ridge least squares on the linked values (from an all-ones start the sigmoid saturates, and the
optimizer stays there, from three experts on). Where there are fewer points than unknowns it is the fit of the least
norm, so that the full quadratic serves in any number of dimensions.

Shape letters: N points, M objectives, D dimensions, P = (D+1)(D+2)/2 monomials, H ridges, K eigenvalues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.records import Floats, Items
from evomerge.surrogates.link import Link

EQUAL_SHARES = 12  # dimensions in which slopes and curvatures of one size vary a predictor over the box equally
REFINEMENTS = 5  # evaluations of Levenberg-Marquardt: it starts near, and more change nothing


@dataclass(frozen=True, slots=True)
class Quadratic:
    """A fitted surrogate; the predictor of objective m at a point c is c'A_m c/2 + b_m'c + e_m.

    Shapes: curvature_MDD (A, symmetric), slope_MD (b), offset_M (e). left_out_NM: the value of every point as the ridge
    fit to all other values predicts it.
    """

    links: tuple[Link, ...]
    curvature_MDD: Floats
    slope_MD: Floats
    offset_M: Floats
    left_out_NM: Floats

    def values(self, points_ND: Floats) -> Floats:
        """Return the predicted values (N, M)."""
        return _columns([link.forward for link in self.links], self._predictors(points_ND))

    def _predictors(self, points_ND: Floats) -> Floats:
        # A c for every objective as one matrix product
        curved_NMD = (points_ND @ np.hstack(tuple(self.curvature_MDD))).reshape(len(points_ND), *self.slope_MD.shape)
        predictors_NM: Floats = np.einsum("nmd,nd->nm", 0.5 * curved_NMD + self.slope_MD, points_ND) + self.offset_M
        return predictors_NM


def fit(
    points_ND: Floats,
    values_NM: Floats,
    links: Sequence[Link],
    *,
    ridges: Sequence[float] = (1e-4,),
    refine: bool = False,
) -> Quadratic:
    """Return the surrogate of finite values (N, M) at points (N, D) in [0, 1]^D.

    ridges: what is added to the diagonal of the normal equations, relative to its mean; of several, each objective
    takes the one whose left-out values come nearest. refine: go on from there by Levenberg-Marquardt on the values
    themselves, where a point weighs as much as its link is steep.
    Raises: ValueError for values outside a link's range.
    """
    linked_NM = _columns([link.inverse for link in links], values_NM)
    mean_M = linked_NM.mean(axis=0)  # the ridge shrinks predictors towards their mean, not towards 0
    features_NP = _monomials(points_ND)
    coefficients_PM, left_out_NM = np.empty((features_NP.shape[1], len(links))), np.empty_like(values_NM)
    fits = _ridge_fits(features_NP, linked_NM - mean_M, ridges)
    for m, link in enumerate(links):
        left_out_HN = [link.forward(left_out_NM[:, m] + mean_M[m]) for _, left_out_NM in fits]
        best = int(np.argmin([((left_out_N - values_NM[:, m]) ** 2).sum() for left_out_N in left_out_HN]))
        coefficients_PM[:, m], left_out_NM[:, m] = fits[best][0][:, m], left_out_HN[best]
        if refine:
            to_values = _ToValues(link, values_NM[:, m], mean_M[m], features_NP)
            coefficients_PM[:, m] = to_values.refined(coefficients_PM[:, m], ridges[best])
    return _in_coordinates(tuple(links), coefficients_PM, mean_M, left_out_NM)


@dataclass(frozen=True, slots=True)
class _ToValues:
    """The residuals of one objective's values through the link."""

    link: Link
    values_N: Floats
    mean: float
    features_NP: Floats

    def refined(self, coefficients_P: Floats, ridge: float) -> Floats:
        """Return where Levenberg-Marquardt gets in REFINEMENTS evaluations, held back by a ridge around the start.

        Around 0 it would undo what the linked values say of points at which the link is flat.
        """
        from scipy.optimize import least_squares

        slopes_NP = self.slopes(coefficients_P)
        penalty_P = np.full(len(coefficients_P), np.sqrt(ridge * (slopes_NP**2).sum() / len(coefficients_P)))
        refined = least_squares(
            lambda trial_P: np.concatenate([self.residuals(trial_P), penalty_P * (trial_P - coefficients_P)]),
            coefficients_P,
            lambda trial_P: np.vstack([self.slopes(trial_P), np.diag(penalty_P)]),
            method="lm",
            max_nfev=REFINEMENTS,
        )
        return np.asarray(refined.x)

    def residuals(self, coefficients_P: Floats) -> Floats:
        """Return them, (N,)."""
        return self.link.forward(self.features_NP @ coefficients_P + self.mean) - self.values_N

    def slopes(self, coefficients_P: Floats) -> Floats:
        """Return d residuals / d coefficients, (N, P)."""
        return self.link.derivative(self.features_NP @ coefficients_P + self.mean)[:, None] * self.features_NP


def _ridge_fits(features_NP: Floats, targets_NM: Floats, ridges: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Return for every ridge the coefficients (P, M) and what the fit to all other points says of each, (N, M).

    The smaller of the two Gram matrices is decomposed once. Left-out predictions are those of Allen's PRESS: the
    residual over 1 - h, where h is the point's own share in its prediction.
    """
    num_points, num_monomials = features_NP.shape
    if num_points <= num_monomials:
        energy_K, left_NK = np.linalg.eigh(features_NP @ features_NP.T)
        energy_K = np.maximum(energy_K, 1e-12 * energy_K[-1])  # rounding makes zeros negative
        rows_NK, back_PK = left_NK * np.sqrt(energy_K), features_NP.T @ (left_NK / np.sqrt(energy_K))
    else:
        energy_K, back_PK = np.linalg.eigh(features_NP.T @ features_NP)
        energy_K = np.maximum(energy_K, 1e-12 * energy_K[-1])
        rows_NK = features_NP @ back_PK
    fits = []
    for ridge in ridges:
        damped_K = energy_K + ridge * energy_K.sum() / num_monomials
        solved_KM = (rows_NK.T @ targets_NM) / damped_K[:, None]
        own_N = (rows_NK**2 / damped_K).sum(axis=1)
        residuals_NM = targets_NM - rows_NK @ solved_KM
        fits.append((back_PK @ solved_KM, targets_NM - residuals_NM / (1.0 - own_N)[:, None]))
    return fits


def _pairs(num_dimensions: int) -> tuple[Items, Items, Floats]:
    """Return the factors of each quadratic monomial and its scale.

    The scales make the ridge the same in all directions (it is the Frobenius norm of A), and leave slopes and
    curvatures equal shares of what a predictor varies: unhindered, the many curvatures would take nearly all.
    """
    first_Q, second_Q = np.triu_indices(num_dimensions)
    share = min(1.0, np.sqrt(EQUAL_SHARES / num_dimensions))
    return first_Q, second_Q, share * np.where(first_Q == second_Q, 0.5, np.sqrt(0.5))


def _monomials(points_ND: Floats) -> Floats:
    """Return 1, x and the products of two of x = 2 c - 1, (N, P): centered, they are nearly uncorrelated."""
    first_Q, second_Q, scale_Q = _pairs(points_ND.shape[1])
    x_ND = 2.0 * points_ND - 1.0
    return np.hstack([np.ones((len(x_ND), 1)), x_ND, scale_Q * x_ND[:, first_Q] * x_ND[:, second_Q]])


def _in_coordinates(links: tuple[Link, ...], coefficients_PM: Floats, mean_M: Floats, left_out_NM: Floats) -> Quadratic:
    """Turn coefficients of monomials in x = 2 c - 1 into A, b and e, which are in c."""
    num_dimensions, num_objectives = int(np.sqrt(2 * len(coefficients_PM))) - 1, len(links)
    first_Q, second_Q, scale_Q = _pairs(num_dimensions)
    constant_M, slope_MD = coefficients_PM[0], coefficients_PM[1 : num_dimensions + 1].T
    half_MDD = np.zeros((num_objectives, num_dimensions, num_dimensions))
    half_MDD[:, first_Q, second_Q] = scale_Q * coefficients_PM[num_dimensions + 1 :].T
    curvature_MDD = half_MDD + half_MDD.transpose(0, 2, 1)  # in x
    return Quadratic(
        links=links,
        curvature_MDD=4.0 * curvature_MDD,
        slope_MD=2.0 * slope_MD - 2.0 * curvature_MDD.sum(axis=2),
        offset_M=mean_M + constant_M - slope_MD.sum(axis=1) + 0.5 * curvature_MDD.sum(axis=(1, 2)),
        left_out_NM=left_out_NM,
    )


def _columns(functions: Sequence[Callable[[Floats], Floats]], numbers_NM: Floats) -> Floats:
    """Apply each objective's function to its column."""
    return np.stack([function(numbers_N) for function, numbers_N in zip(functions, numbers_NM.T, strict=True)], axis=1)
