"""Comparing two models on the same items: paired, and clustered by source.

Two models that saw the same items differ by much less than their own standard errors suggest: the items' difficulty
cancels. Items of one source (one image seen by several tasks) are one draw, not several.
Shape letters: N items.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evomerge.evidence.scores import cluster_error, source_codes
from evomerge.evidence.summary import Sources
from evomerge.records import Floats, Measurement, Objective


class Difference(NamedTuple):
    """By how much one thing is better than another, and the standard error of that."""

    value: float
    stderr: float


def paired_difference(
    ours: Measurement, theirs: Measurement, objectives: Sequence[Objective], sources: Sources
) -> Difference:
    """Return by how much ``ours`` is better in the mean over objectives; both are scored on all items of a split.

    The error is that of the items' deviations from their objective's mean gain, summed by source over all objectives.
    """
    return _mean_over([gains(ours, theirs, objective) for objective in objectives], objectives, sources)


def paired_differences(
    ours: Measurement, theirs: Measurement, objectives: Sequence[Objective], sources: Sources
) -> dict[str, Difference]:
    """Return by how much ``ours`` is better in each objective."""
    return {objective.name: paired_difference(ours, theirs, [objective], sources) for objective in objectives}


def gains(ours: Measurement, theirs: Measurement, objective: Objective) -> Floats:
    """Return by how much ``ours`` is better on each item, (N,)."""
    return maximized_items(ours, objective) - maximized_items(theirs, objective)


def maximized_items(measurement: Measurement, objective: Objective) -> Floats:
    """Return the items' numbers, (N,), larger is better; their mean is the score."""
    return objective.sign * measurement.scores[objective.name].items.astype(np.float64)


def search_test_gap(
    searched: Measurement,
    tested: Measurement,
    objectives: Sequence[Objective],
    search_sources: Sources,
    test_sources: Sources,
) -> Difference:
    """Return by how much one model looks better on search items than on test items, in the mean over objectives.

    The items are independent draws: the variances add. Of a model that was picked by its search score it is to be
    positive, see ``optimism.py``.
    """
    search, test = (
        _mean_over([maximized_items(measurement, objective) for objective in objectives], objectives, sources)
        for measurement, sources in ((searched, search_sources), (tested, test_sources))
    )
    return Difference(search.value - test.value, float(np.hypot(search.stderr, test.stderr)))


def _mean_over(items: Sequence[Floats], objectives: Sequence[Objective], sources: Sources) -> Difference:
    """Return the mean over objectives of the means over items, clustered by the sources of all."""
    residuals_N = np.concatenate([(items_N - items_N.mean()) / len(items_N) for items_N in items]) / len(items)
    codes_N = source_codes([source for objective in objectives for source in sources[objective.name]])
    return Difference(float(np.mean([items_N.mean() for items_N in items])), cluster_error(residuals_N, codes_N))
