"""Comparing two models on the same items: paired, and clustered by source.

Two models that saw the same items differ by much less than their own standard errors suggest: the items' difficulty
cancels. Items of one source (one image seen by several tasks) are one draw, not several.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.records import Floats, Measurement, Objective


def paired_difference(
    ours: Measurement,
    theirs: Measurement,
    objectives: Sequence[Objective],
    sources: Mapping[str, Sequence[int | str]],
) -> tuple[float, float]:
    """Return (difference, standard error) of the mean over objectives, positive where ``ours`` is better.

    sources maps a task to the sources of the split's items, in their order. With S sources whose contributions x_s
    sum to the difference, its variance is ``S / (S - 1) * sum_s (x_s - mean)^2``.
    """
    contributions: dict[str, float] = {}
    for objective in objectives:
        gains = objective.sign * (_items(ours, objective) - _items(theirs, objective)) / len(objectives)
        for source, gain in zip(sources[objective.task], gains / len(gains), strict=True):
            contributions[str(source)] = contributions.get(str(source), 0.0) + float(gain)
    x_S = np.array(list(contributions.values()))
    return float(x_S.sum()), float(np.sqrt(len(x_S) / (len(x_S) - 1) * ((x_S - x_S.mean()) ** 2).sum()))


def _items(measurement: Measurement, objective: Objective) -> Floats:
    return measurement.scores[objective.name].items.astype(np.float64)
