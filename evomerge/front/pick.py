"""Picking one model from a front.

Shape letters: N members of the front, M objectives; all values maximized.
"""

import numpy as np

from evomerge.records import Floats


def knee(values_NM: Floats) -> int:
    """Return the row with the best balance: farthest above the plane through the front's extremes.

    With every objective scaled to [0, 1] over the front, that plane is ``sum_m f_m = const``.
    Reference: Das 1999, "On characterizing the knee of the Pareto curve based on normal-boundary intersection".
    """
    return int(np.argmax(balance(values_NM)))


def balance(values_NM: Floats) -> Floats:
    """Return the sum of a row's objectives, each scaled to [0, 1] over all rows, (N,)."""
    balance_N: Floats = _scaled(values_NM).sum(axis=1)
    return balance_N


def prefer(values_NM: Floats, weights_M: Floats) -> int:
    """Return the row that serves a preference best: the augmented Tchebycheff scalarization of the scaled objectives.

    It can reach every member of the front, where a weighted sum finds only those on its convex hull.
    weights_M: positive or zero, one at least positive; 2 against 1 counts a shortfall twice.
    Reference: Steuer and Choo 1983, an interactive weighted Tchebycheff procedure.
    """
    weights_M = weights_M / weights_M.sum()
    shortfall_NM = weights_M * (1.0 - _scaled(values_NM))
    return int(np.argmin(shortfall_NM.max(axis=1) + 0.05 * shortfall_NM.sum(axis=1)))


def _scaled(values_NM: Floats) -> Floats:
    """Scale every objective to [0, 1] over the front; an objective in which all are equal counts as 1."""
    low_M, high_M = values_NM.min(axis=0), values_NM.max(axis=0)
    span_M = np.where(high_M > low_M, high_M - low_M, 1.0)
    return np.where(high_M > low_M, (values_NM - low_M) / span_M, 1.0)
