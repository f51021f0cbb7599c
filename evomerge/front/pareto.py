"""Dominance and hypervolume; finite, maximized values only.

Shape letters: N candidates, M objectives.
"""

import numpy as np
import numpy.typing as npt

from evomerge.records import Floats


def non_dominated(values_NM: Floats) -> npt.NDArray[np.bool_]:
    """Return which rows no other row dominates, shape (N,); of equal rows the first alone counts.

    Raises: ValueError for non-finite values: a candidate without them is a failed trial and has no place here.
    """
    import moocore

    _check_finite(values_NM)
    if not len(values_NM):
        return np.zeros(0, dtype=np.bool_)
    kept: npt.NDArray[np.bool_] = moocore.is_nondominated(values_NM, maximise=True, keep_weakly=False)
    return kept


def hypervolume(values_NM: Floats, reference_M: Floats) -> float:
    """Return the volume that the rows dominate above the reference point; a row below it anywhere adds nothing."""
    import moocore

    _check_finite(values_NM)
    _check_finite(reference_M[None])
    above_NM = values_NM[(values_NM > reference_M).all(axis=1)]
    if not len(above_NM):
        return 0.0
    return float(moocore.hypervolume(above_NM, ref=reference_M, maximise=True))


def _check_finite(values_NM: Floats) -> None:
    if values_NM.ndim != 2 or not np.isfinite(values_NM).all():
        raise ValueError(f"values: expected finite numbers of shape (N, M), got shape {values_NM.shape}")
