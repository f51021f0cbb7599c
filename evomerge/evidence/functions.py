"""Numbers that are made of many models' scores at once, such as a front's hypervolume: how sure they are.

The sources are drawn anew, and the number is made of the scores that the models then have. Noise does more than scatter
it: of many models those count that had luck, and the number is too large on average. A resample is noisy once more than
what was measured, and larger again; intervals are moved by that much (Efron and Tibshirani 1993, 10.2). Of how often
they then hold the truth, see tests/evidence/test_functions.py.

Shape letters: K models, M objectives, R resamples, S sources.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evomerge.evidence.compare import maximized_items
from evomerge.evidence.intervals import student
from evomerge.evidence.resampling import contributions, resampled_counts
from evomerge.evidence.summary import Sources
from evomerge.records import Floats, Measurement, Objective

NUM_RESAMPLES = 500  # they give an error to 3 %, and the middle to 4 % of one
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, its standard error, and the interval that holds the truth in 95 of 100 cases.

    Of one source, which says nothing about others, the error and the interval are endless.
    """

    value: float
    stderr: float
    interval: tuple[float, float]

    @property
    def verdict(self) -> Literal["better", "worse", "alike"]:
        """Of a difference, larger is better: whether it is above or below 0 beyond noise."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "alike"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """A number as it was measured, and as it is where the sources are drawn anew (R,)."""

    value: float
    drawn_R: Floats
    num_sources: int

    @property
    def estimate(self) -> Estimate:
        """The number with its error and interval."""
        if self.num_sources < 2:
            return Estimate(value=self.value, stderr=float("inf"), interval=(float("-inf"), float("inf")))
        # The variance of resamples is that of a sum over S sources without Bessel's correction.
        stderr = float(self.drawn_R.std() * np.sqrt(self.num_sources / (self.num_sources - 1)))
        middle = 2 * self.value - float(self.drawn_R.mean())
        half = student(self.num_sources, LEVEL) * stderr
        return Estimate(value=self.value, stderr=stderr, interval=(middle - half, middle + half))

    def less(self, other: "Resampled", *, is_paired: bool) -> Estimate:
        """Return the difference to another number: of the same items, or of others that are drawn on their own."""
        drawn_R = other.drawn_R if is_paired else np.roll(other.drawn_R, 1)  # two resamples of one draw are independent
        return Resampled(
            value=self.value - other.value,
            drawn_R=self.drawn_R - drawn_R,
            num_sources=min(self.num_sources, other.num_sources),
        ).estimate


def resampled(
    function: Callable[[Floats], float],
    measurements: Sequence[Measurement],
    objectives: Sequence[Objective],
    sources: Sources,
) -> Resampled:
    """Return a function of the scores (K, M) of K models, larger is better; all are scored on all items of a split.

    Of the same sources, the same are drawn every time: two numbers of them are paired, whatever their models.
    """
    items = [np.stack([maximized_items(one, objective) for one in measurements]) for objective in objectives]
    scores = [[objective.sign * one.scores[objective.name].value for objective in objectives] for one in measurements]
    values_KM, sums_MKS = np.array(scores), contributions(items, [sources[objective.name] for objective in objectives])
    moved = (
        moved_MK
        for counts_RS in resampled_counts(sums_MKS.shape[2], NUM_RESAMPLES)
        for moved_MK in np.moveaxis(sums_MKS @ counts_RS.T, 2, 0)
    )
    with ThreadPoolExecutor() as pool:  # a hypervolume is found in C, which lets others run meanwhile
        drawn = list(pool.map(lambda moved_MK: function(values_KM + moved_MK.T), moved))
    return Resampled(value=function(values_KM), drawn_R=np.array(drawn), num_sources=sums_MKS.shape[2])
