"""The quadratic surrogate: link(c'Ac/2 + b'c + e) for every objective, from values and, where there are any, gradients.

Reference: MAP, arxiv.org/abs/2406.07529: a second-order Taylor expansion of each metric behind a link. Departures: the
fit begins with ridge least squares on the linked values (from an all-ones start the sigmoid saturates, and the
optimizer stays there, from three experts on), and gradients count as further equations: a value with its gradient gives
1 + D linear equations. They are not independent: between two points, the values' difference follows from the gradients,
and A is symmetric; N points with gradients determine 1 + D + (N-1) D - (N-1)(N-2)/2 of the (D+1)(D+2)/2 unknowns, D + 1
points all of them. Where equations are missing it is the fit of the least norm, so that the full quadratic serves in
any number of dimensions.

Shape letters: N points, M objectives, D dimensions, P = (D+1)(D+2)/2 monomials, R equations, H ridges, K eigenvalues.
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
    fit to all other values predicts it (its own gradient, if there is one, stays in).
    """

    links: tuple[Link, ...]
    curvature_MDD: Floats
    slope_MD: Floats
    offset_M: Floats
    left_out_NM: Floats

    def values(self, points_ND: Floats) -> Floats:
        """Return the predicted values (N, M)."""
        return _columns([link.forward for link in self.links], self._predictors(points_ND))

    def gradients(self, points_ND: Floats) -> Floats:
        """Return the gradients of the predicted values (N, M, D)."""
        steepness_NM = _columns([link.derivative for link in self.links], self._predictors(points_ND))
        gradients_NMD: Floats = steepness_NM[:, :, None] * (self._curved(points_ND) + self.slope_MD)
        return gradients_NMD

    def _predictors(self, points_ND: Floats) -> Floats:
        sloped_NMD = 0.5 * self._curved(points_ND) + self.slope_MD
        predictors_NM: Floats = np.einsum("nmd,nd->nm", sloped_NMD, points_ND) + self.offset_M
        return predictors_NM

    def _curved(self, points_ND: Floats) -> Floats:
        """A c for every objective as one matrix product, (N, M, D)."""
        curved_NMD: Floats = points_ND @ np.hstack(tuple(self.curvature_MDD))
        return curved_NMD.reshape(len(points_ND), *self.slope_MD.shape)


def fit(
    points_ND: Floats,
    values_NM: Floats,
    links: Sequence[Link],
    gradients_NMD: Floats | None = None,
    *,
    ridges: Sequence[float] = (1e-4,),
    refine: bool = False,
) -> Quadratic:
    """Return the surrogate of finite values (N, M) at points (N, D) in [0, 1]^D.

    gradients_NMD: of the values; a point without them is NaN in all objectives. A value's gradient over the link's
    derivative is its predictor's. ridges: what is added to the diagonal of the normal equations, relative to its mean;
    of several, each objective takes the one whose left-out values come nearest. refine: go on from there by
    Levenberg-Marquardt on the values themselves, where a point weighs as much as its link is steep.
    Raises: ValueError for values outside a link's range.
    """
    num_points, num_dimensions = points_ND.shape
    linked_NM = _columns([link.inverse for link in links], values_NM)
    steepness_RM = _columns([link.derivative for link in links], linked_NM)
    mean_M = linked_NM.mean(axis=0)  # the ridge shrinks predictors towards their mean, not towards 0
    features_RP, targets_RM = _monomials(points_ND), linked_NM - mean_M
    if gradients_NMD is not None:
        has_N = np.isfinite(gradients_NMD).all(axis=(1, 2))
        slopes_NMD = gradients_NMD[has_N] / steepness_RM[has_N][:, :, None]
        features_RP = np.vstack([features_RP, _monomial_slopes(points_ND[has_N])])
        targets_RM = np.vstack([targets_RM, slopes_NMD.transpose(0, 2, 1).reshape(-1, len(links))])
        steepness_RM = np.vstack([steepness_RM, steepness_RM[has_N].repeat(num_dimensions, axis=0)])

    coefficients_PM, left_out_NM = np.empty((features_RP.shape[1], len(links))), np.empty_like(values_NM)
    fits = _ridge_fits(features_RP, targets_RM, ridges)
    for m, link in enumerate(links):
        left_out_HN = [link.forward(left_out_RM[:num_points, m] + mean_M[m]) for _, left_out_RM in fits]
        best = int(np.argmin([((left_out_N - values_NM[:, m]) ** 2).sum() for left_out_N in left_out_HN]))
        coefficients_PM[:, m], left_out_NM[:, m] = fits[best][0][:, m], left_out_HN[best]
        if refine:
            to_values = _ToValues(link, values_NM[:, m], mean_M[m], features_RP, targets_RM[:, m], steepness_RM[:, m])
            coefficients_PM[:, m] = to_values.refined(coefficients_PM[:, m], ridges[best])
    return _in_coordinates(tuple(links), coefficients_PM, mean_M, left_out_NM)


@dataclass(frozen=True, slots=True)
class _ToValues:
    """The residuals of one objective: of the values through the link, of the gradients weighted by its steepness."""

    link: Link
    values_N: Floats
    mean: float
    features_RP: Floats
    targets_R: Floats
    steepness_R: Floats

    def refined(self, coefficients_P: Floats, ridge: float) -> Floats:
        """Return where Levenberg-Marquardt gets in REFINEMENTS evaluations, held back by a ridge around the start.

        Around 0 it would undo what the linked values say of points at which the link is flat.
        """
        from scipy.optimize import least_squares

        slopes_RP = self.slopes(coefficients_P)
        penalty_P = np.full(len(coefficients_P), np.sqrt(ridge * (slopes_RP**2).sum() / len(coefficients_P)))
        refined = least_squares(
            lambda trial_P: np.concatenate([self.residuals(trial_P), penalty_P * (trial_P - coefficients_P)]),
            coefficients_P,
            lambda trial_P: np.vstack([self.slopes(trial_P), np.diag(penalty_P)]),
            method="lm",
            max_nfev=REFINEMENTS,
        )
        return np.asarray(refined.x)

    def residuals(self, coefficients_P: Floats) -> Floats:
        """Return those of the values, then those of the gradients, (R,)."""
        predicted_R, n = self.features_RP @ coefficients_P, len(self.values_N)
        of_values_N = self.link.forward(predicted_R[:n] + self.mean) - self.values_N
        return np.concatenate([of_values_N, self.steepness_R[n:] * (predicted_R - self.targets_R)[n:]])

    def slopes(self, coefficients_P: Floats) -> Floats:
        """Return d residuals / d coefficients, (R, P)."""
        n = len(self.values_N)
        steepness_N = self.link.derivative(self.features_RP[:n] @ coefficients_P + self.mean)
        return np.concatenate([steepness_N, self.steepness_R[n:]])[:, None] * self.features_RP


def _ridge_fits(features_RP: Floats, targets_RM: Floats, ridges: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Return for every ridge the coefficients (P, M) and what the fit to all other equations says of each, (R, M).

    The smaller of the two Gram matrices is decomposed once. Left-out predictions are those of Allen's PRESS: the
    residual over 1 - h, where h is the equation's own share in its prediction.
    """
    num_equations, num_monomials = features_RP.shape
    if num_equations <= num_monomials:
        energy_K, left_RK = np.linalg.eigh(features_RP @ features_RP.T)
        energy_K = np.maximum(energy_K, 1e-12 * energy_K[-1])  # rounding makes zeros negative
        rows_RK, back_PK = left_RK * np.sqrt(energy_K), features_RP.T @ (left_RK / np.sqrt(energy_K))
    else:
        energy_K, back_PK = np.linalg.eigh(features_RP.T @ features_RP)
        energy_K = np.maximum(energy_K, 1e-12 * energy_K[-1])
        rows_RK = features_RP @ back_PK
    fits = []
    for ridge in ridges:
        damped_K = energy_K + ridge * energy_K.sum() / num_monomials
        solved_KM = (rows_RK.T @ targets_RM) / damped_K[:, None]
        own_R = (rows_RK**2 / damped_K).sum(axis=1)
        residuals_RM = targets_RM - rows_RK @ solved_KM
        fits.append((back_PK @ solved_KM, targets_RM - residuals_RM / (1.0 - own_R)[:, None]))
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


def _monomial_slopes(points_ND: Floats) -> Floats:
    """Return the derivatives of the monomials by every coordinate of c, (N*D, P)."""
    num_points, num_dimensions = points_ND.shape
    first_Q, second_Q, scale_Q = _pairs(num_dimensions)
    x_N1D, eye_DD = 2.0 * points_ND[:, None] - 1.0, np.eye(num_dimensions)
    squared_NDQ = scale_Q * (eye_DD[:, first_Q] * x_N1D[:, :, second_Q] + eye_DD[:, second_Q] * x_N1D[:, :, first_Q])
    linear_NDD = np.broadcast_to(eye_DD, (num_points, num_dimensions, num_dimensions))
    slopes_NDP = np.concatenate([np.zeros((num_points, num_dimensions, 1)), linear_NDD, squared_NDQ], axis=2)
    return 2.0 * slopes_NDP.reshape(num_points * num_dimensions, -1)


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
