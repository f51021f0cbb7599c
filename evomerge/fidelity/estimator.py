"""What an estimator is: from a candidate's first items and the finished models, what all items would give."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from evomerge.records import Floats, Measurement, Objective


class Estimate(NamedTuple):
    """The mean over all items of an objective, and by how much it may be off (one standard error)."""

    value: float
    stderr: float


class Estimator(Protocol):
    """Estimates objectives that are means over items; made with them and the rounds of a race."""

    def estimates(self, partial: Measurement, finished: Sequence[Measurement]) -> dict[str, Estimate]:
        """Return objective -> estimate; finished: at least 2 models on all items, in the order in which they came."""


def item_numbers(measurement: Measurement, objective: Objective) -> Floats:
    """Return the items' numbers, in the order of the measurement."""
    return measurement.scores[objective.name].items.astype(np.float64)
