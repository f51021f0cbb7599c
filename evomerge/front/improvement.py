"""By how much further points would raise a hypervolume: exact, for many points at once.

The dominated region is cut into disjoint boxes by its local upper bounds (Lacour, Klamroth and Fonseca 2017,
Computers & Operations Research 79, section 4.2: the incremental algorithm, and the boxes of its bounds). What a point
adds is its own box above the reference point less what the boxes cut out of it.
Shape letters: N points, M objectives, U bounds (one box each), S points that are asked about.
"""

from functools import cached_property

import numpy as np

from evomerge.front.pareto import non_dominated
from evomerge.records import Floats

MAX_CELLS = 4_000_000  # numbers of a block of work: 32 MB


class Improvement:
    """Hypervolume and its improvements over points (N, M), finite and maximized, above a reference point (M,)."""

    def __init__(self, values_NM: Floats, reference_M: Floats) -> None:
        above_NM = values_NM[(values_NM > reference_M).all(axis=1)]
        self._reference_M = reference_M
        # Minimized from here on: a bound u stands for all that is better than u in every objective.
        self._lower_UM, self._upper_UM = _boxes(-above_NM[non_dominated(above_NM)], -reference_M)

    @cached_property
    def volume(self) -> float:
        """Hypervolume of the points."""
        return float((self._upper_UM - self._lower_UM).prod(axis=1).sum())

    def gains(self, values_SM: Floats) -> Floats:
        """Return by how much each point alone would raise the hypervolume, (S,); 0 where it would not."""
        own_S = (values_SM - self._reference_M).clip(min=0).prod(axis=1)
        covered_S = np.zeros(len(values_SM))
        block = max(1, MAX_CELLS // max(self._lower_UM.size, 1))
        for start in range(0, len(values_SM), block):
            corner_SM = -values_SM[start : start + block]
            inside_SU = np.ones((len(corner_SM), len(self._lower_UM)))
            for lower_U, upper_U, corner_S in zip(self._lower_UM.T, self._upper_UM.T, corner_SM.T, strict=True):
                inside_SU *= (upper_U - np.maximum(lower_U, corner_S[:, None])).clip(min=0)
            covered_S[start : start + block] = inside_SU.sum(axis=1)
        gains_S: Floats = (own_S - covered_S).clip(min=0)
        return np.where((gains_S > 1e-12 * own_S), gains_S, 0.0)


def _boxes(points_NM: Floats, worst_M: Floats) -> tuple[Floats, Floats]:
    """Return lower and upper corners (U, M) of disjoint boxes that fill what the points dominate, up to ``worst_M``.

    Points and region are minimized. Every bound u knows, for each objective j, the point that gives it u_j.
    """
    num_objectives = len(worst_M)
    bounds_UM = worst_M[None].copy()
    given_UMM = np.full((1, num_objectives, num_objectives), -np.inf)
    given_UMM[0, np.arange(num_objectives), np.arange(num_objectives)] = worst_M
    for point_M in points_NM:
        is_hit_U = (point_M < bounds_UM).all(axis=1)
        hit_UM, given_hit_UMM = bounds_UM[is_hit_U], given_UMM[is_hit_U]
        bounds, given = [bounds_UM[~is_hit_U]], [given_UMM[~is_hit_U]]
        for j in range(num_objectives):
            others_U = np.delete(given_hit_UMM[:, :, j], j, axis=1).max(axis=1, initial=-np.inf)
            stays_U = point_M[j] >= others_U
            new_UM, new_UMM = hit_UM[stays_U], given_hit_UMM[stays_U]
            new_UM[:, j] = point_M[j]
            new_UMM[:, j] = point_M
            bounds.append(new_UM)
            given.append(new_UMM)
        bounds_UM, given_UMM = np.concatenate(bounds), np.concatenate(given)
    lower_UM, upper_UM = bounds_UM.copy(), bounds_UM.copy()
    upper_UM[:, 0] = worst_M[0]
    for j in range(1, num_objectives):
        lower_UM[:, j] = given_UMM[:, :j, j].max(axis=1)
    fills_U = (lower_UM < upper_UM).all(axis=1)
    return lower_UM[fills_U], upper_UM[fills_U]
