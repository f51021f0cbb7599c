"""One model beside another, objective by objective, on the same items: what it gains, how sure that is, and where.

Shape letters: N items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evomerge.evidence.compare import Difference, gains, paired_difference
from evomerge.evidence.intervals import difference_intervals
from evomerge.evidence.summary import Sources
from evomerge.records import Measurement, Objective, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models in one objective.

    gain: by how much ours is better, with its standard error. interval: of the gain, at 95 %; clustered by source, as
    the error is. num_gained, num_lost: items on which ours is better, or worse; None for a summary, which has none of
    its own.
    """

    objective: Objective
    ours: Score
    theirs: Score
    gain: Difference
    interval: tuple[float, float]
    num_items: int
    num_gained: int | None
    num_lost: int | None

    @property
    def verdict(self) -> Literal["better", "worse", "alike"]:
        """Whether ours is better or worse beyond noise, by the interval alone; alike where that cannot be told."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "alike"


def paired(ours: Measurement, theirs: Measurement, objectives: Sequence[Objective], sources: Sources) -> list[Pair]:
    """Compare two models in each objective; both are scored on all items of a split."""
    return [_pair(ours, theirs, objective, sources) for objective in objectives]


def _pair(ours: Measurement, theirs: Measurement, objective: Objective, sources: Sources) -> Pair:
    gains_N = gains(ours, theirs, objective)
    low, high = difference_intervals(gains_N[None], sources[objective.name])[0].tolist()
    is_summary = objective.summary is not None
    return Pair(
        objective=objective,
        ours=ours.scores[objective.name],
        theirs=theirs.scores[objective.name],
        gain=paired_difference(ours, theirs, [objective], sources),
        interval=(low, high),
        num_items=len(gains_N),
        num_gained=None if is_summary else int(np.count_nonzero(gains_N > 0)),
        num_lost=None if is_summary else int(np.count_nonzero(gains_N < 0)),
    )
