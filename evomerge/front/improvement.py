"""By how much further points would raise a hypervolume: exact, for many points at once.

The dominated region is cut into disjoint boxes by its local upper bounds (Lacour, Klamroth and Fonseca 2017,
Computers & Operations Research 79, section 4.2: the incremental algorithm, and the boxes of its bounds). What a point
adds is its own box above the reference point less what the boxes cut out of it.
Shape letters: N points, M objectives, U bounds (one box each), S points that are asked about, V directions; P points to
choose from, of S draws each.
"""

from copy import copy
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from evomerge.front.pareto import non_dominated
from evomerge.records import Floats

MAX_EXACT = 4  # objectives: with 100 points on the front there are 500 boxes for 4, 1,600 for 5 and 30,000 for 8
NUM_DIRECTIONS = 512
NUM_ROOT_STEPS = 50  # towards the root of x^(M + 1) = x + 1, to all digits
MAX_CELLS = 2**15  # numbers of a block of work: two of them stay in the cache


class Improvement:
    """Hypervolume and its improvements over points (N, M), finite and maximized, above a reference point (M,)."""

    def __init__(self, values_NM: Floats, reference_M: Floats) -> None:
        above_NM = values_NM[(values_NM > reference_M).all(axis=1)]
        self._reference_M = reference_M
        # Minimized from here on: a bound u stands for all that is better than u in every objective.
        self._bounds = _bounds(-above_NM[non_dominated(above_NM)], _whole(-reference_M))
        self._lower_UM, self._upper_UM = _boxes(*self._bounds, -reference_M)

    def with_point(self, value_M: Floats) -> "Improvement":
        """Return the improvements over one more point."""
        if not (value_M > self._reference_M).all():
            return self
        extended = copy(self)
        extended.__dict__.pop("volume", None)
        extended._bounds = _bounds(-value_M[None], self._bounds)
        extended._lower_UM, extended._upper_UM = _boxes(*extended._bounds, -self._reference_M)
        return extended

    @cached_property
    def volume(self) -> float:
        """Hypervolume of the points."""
        return float((self._upper_UM - self._lower_UM).prod(axis=1).sum())

    def gains(self, values_SM: Floats) -> Floats:
        """Return by how much each point alone would raise the hypervolume, (S,); 0 where it would not."""
        own_S = (values_SM - self._reference_M).clip(min=0).prod(axis=1)
        covered_S = np.zeros(len(values_SM))
        above = np.flatnonzero(own_S)
        block = max(1, MAX_CELLS // max(self._lower_UM.size, 1))
        for start in range(0, len(above), block):
            asked = above[start : start + block]
            inside_SU = np.ones((len(asked), len(self._lower_UM)))
            side_SU = np.empty_like(inside_SU)
            for lower_U, upper_U, corner_S in zip(self._lower_UM.T, self._upper_UM.T, -values_SM[asked].T, strict=True):
                np.maximum(lower_U, corner_S[:, None], out=side_SU)
                np.subtract(upper_U, side_SU, out=side_SU)
                inside_SU *= np.maximum(side_SU, 0.0, out=side_SU)
            covered_S[asked] = inside_SU.sum(axis=1)
        gains_S: Floats = (own_S - covered_S).clip(min=0)
        return np.where((gains_S > 1e-12 * own_S), gains_S, 0.0)


class SampledImprovement:
    """The same by sampling directions, for many objectives, where boxes grow too many.

    The hypervolume is c_M times the mean over directions of (max over points of min_j (y_j - r_j) / direction_j)^M,
    with c_M = pi^(M/2) / (2^M Gamma(M/2 + 1)) (Zhang and Golovin 2020, arxiv.org/abs/2006.04655, lemma 5). The
    directions are the same for all points; a gain that no direction sees is 0.
    """

    def __init__(self, values_NM: Floats, reference_M: Floats) -> None:
        from scipy.special import gamma

        num_objectives = len(reference_M)
        self._inverse_VM = _inverse_directions(num_objectives)
        self._factor = float(np.pi ** (num_objectives / 2) / (2**num_objectives * gamma(num_objectives / 2 + 1)))
        self._reference_M = reference_M
        self._best_V = self._reaches(values_NM).max(axis=0, initial=0.0)

    def with_point(self, value_M: Floats) -> "SampledImprovement":
        """Return the improvements over one more point."""
        extended = copy(self)
        extended._best_V = np.maximum(self._best_V, self._reaches(value_M[None])[0])
        return extended

    @property
    def volume(self) -> float:
        """Hypervolume of the points."""
        return float(self._factor * (self._best_V.astype(np.float64) ** len(self._reference_M)).mean())

    def gains(self, values_SM: Floats) -> Floats:
        """Return by how much each point alone would raise the hypervolume, (S,)."""
        power = len(self._reference_M)
        beyond_S = np.zeros(len(values_SM))
        block = MAX_CELLS // NUM_DIRECTIONS
        for start in range(0, len(values_SM), block):
            reach_SV = self._reaches(values_SM[start : start + block])
            rows, directions = np.nonzero(reach_SV > self._best_V)  # few of all, and a power is slow
            reached = reach_SV[rows, directions].astype(np.float64)
            beyond = reached**power - self._best_V[directions].astype(np.float64) ** power
            beyond_S[start : start + block] = np.bincount(rows, beyond, len(reach_SV))
        return np.asarray(self._factor * beyond_S / NUM_DIRECTIONS)

    def _reaches(self, values_NM: Floats) -> npt.NDArray[np.float32]:
        """Return how far each point dominates along each direction, (N, V); below 0 where it does not."""
        above_NM = (values_NM - self._reference_M).astype(np.float32)
        reach_NV = np.full((len(values_NM), NUM_DIRECTIONS), np.inf, dtype=np.float32)
        side_NV = np.empty_like(reach_NV)
        for above_N, inverse_V in zip(above_NM.T, self._inverse_VM.T, strict=True):
            np.minimum(reach_NV, np.multiply(above_N[:, None], inverse_V, out=side_NV), out=reach_NV)
        return reach_NV


@cache
def _inverse_directions(num_objectives: int) -> npt.NDArray[np.float32]:
    """Return one by each coordinate of directions spread over the positive part of the sphere, (V, M).

    They come from multiples of an irrational vector, modulo 1, which fill the box evenly (Kronecker's sequence, with
    the roots that Roberts 2018 takes, extremelearning.com.au). In single precision, as sampling errs by far more.
    """
    from scipy.special import ndtri

    root = 2.0
    for _ in range(NUM_ROOT_STEPS):
        root = (1 + root) ** (1 / (num_objectives + 1))
    steps_M = root ** -np.arange(1.0, num_objectives + 1)
    uniform_VM = (0.5 + np.arange(1, NUM_DIRECTIONS + 1)[:, None] * steps_M) % 1
    normal_VM = np.abs(ndtri(uniform_VM)).clip(min=1e-9)
    return np.asarray(np.linalg.norm(normal_VM, axis=1, keepdims=True) / normal_VM, dtype=np.float32)


def improvement_over(values_NM: Floats, reference_M: Floats) -> Improvement | SampledImprovement:
    """Return exact improvements, or sampled ones where there are many objectives."""
    kind = Improvement if len(reference_M) <= MAX_EXACT else SampledImprovement
    return kind(values_NM, reference_M)


def most_gaining(
    front: Improvement | SampledImprovement, values_PM: Floats, draws_SPM: Floats, weights_P: Floats, number: int
) -> list[int]:
    """Return the places of points (P, M) that raise a hypervolume most, one after the other, each beside those before.

    What a point adds is the mean over its draws, of which there are S, times its weight; once chosen it counts at its
    value. As that only falls while the front grows, no more are counted again than the best of the old counts
    (Minoux 1978, Accelerated greedy algorithms for maximizing submodular set functions).
    """
    num_draws, num_points, num_objectives = draws_SPM.shape
    gains_SP = front.gains(draws_SPM.reshape(-1, num_objectives)).reshape(num_draws, num_points)
    worth_P = gains_SP.mean(axis=0) * weights_P
    chosen: list[int] = []
    for _ in range(min(number, num_points)):
        is_counted_P = np.full(num_points, not chosen)
        while not is_counted_P[place := int(worth_P.argmax())]:
            worth_P[place] = front.gains(draws_SPM[:, place]).mean() * weights_P[place]
            is_counted_P[place] = True
        chosen.append(place)
        worth_P[place] = -1.0
        front = front.with_point(values_PM[place])
    return chosen


def _whole(worst_M: Floats) -> tuple[Floats, Floats]:
    """Return the one bound (1, M) of no points, and what gives it (1, M, M)."""
    given_UMM = np.full((1, len(worst_M), len(worst_M)), -np.inf)
    np.einsum("ujj->uj", given_UMM)[:] = worst_M
    return worst_M[None].copy(), given_UMM


def _bounds(points_NM: Floats, known: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Return the local upper bounds (U, M) of further points, and for each objective j the point that gives it u_j."""
    bounds_UM, given_UMM = known
    axes = np.arange(bounds_UM.shape[1])
    for point_M in points_NM:
        is_hit_U = (point_M < bounds_UM).all(axis=1)
        hit_UM, given_hit_UMM = bounds_UM[is_hit_U], given_UMM[is_hit_U]
        others_UMM = given_hit_UMM.copy()
        others_UMM[:, axes, axes] = -np.inf
        split, j = np.nonzero(point_M >= others_UMM.max(axis=1))
        new = np.arange(len(j))
        new_UM, new_UMM = hit_UM[split], given_hit_UMM[split]
        new_UM[new, j] = point_M[j]
        new_UMM[new, j] = point_M
        bounds_UM = np.concatenate([bounds_UM[~is_hit_U], new_UM])
        given_UMM = np.concatenate([given_UMM[~is_hit_U], new_UMM])
    return bounds_UM, given_UMM


def _boxes(bounds_UM: Floats, given_UMM: Floats, worst_M: Floats) -> tuple[Floats, Floats]:
    """Return lower and upper corners (U, M) of disjoint boxes that fill what the points dominate, up to ``worst_M``."""
    lower_UM, upper_UM = bounds_UM.copy(), bounds_UM.copy()
    upper_UM[:, 0] = worst_M[0]
    for j in range(1, len(worst_M)):
        lower_UM[:, j] = given_UMM[:, :j, j].max(axis=1)
    fills_U = (lower_UM < upper_UM).all(axis=1)
    return lower_UM[fills_U], upper_UM[fills_U]
