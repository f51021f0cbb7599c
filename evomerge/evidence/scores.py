"""From items' scores to a score with its standard error.

Every score is kept as one number an item whose mean is the score, so that standard errors, paired differences and
resampling are the same for all metrics. Where a metric is no mean (a rank correlation, a perplexity), that number is
the item's jackknife pseudo-value (Efron and Stein 1981).
Shape letters: N items, S sources.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.errors import CandidateError
from evomerge.records import Floats, Items, Score

Aggregate = Callable[[npt.NDArray[Any], Items], float]
MAX_GROUPS = 100  # of sources; a standard error from so many is itself known to 7 %


def cluster_error(residuals_N: Floats, codes_N: Items) -> float:
    """Return the standard error of a sum of N small residuals (their sum is 0) that are drawn source by source.

    codes_N: a number for the source of each item. With r_s the residuals' sum over source s, the variance is
    ``S / (S - 1) * sum_s r_s^2``: of a mean over items of clusters of any size, to first order (Cochran 1977, 6.3).
    One source says nothing about others: infinite.
    """
    num_sources = int(np.count_nonzero(np.bincount(codes_N)))
    if num_sources < 2:
        return float("inf")
    sums_S = np.bincount(codes_N, residuals_N)
    return float(np.sqrt(num_sources / (num_sources - 1) * (sums_S**2).sum()))


def source_codes(sources: Sequence[int | str]) -> Items:
    """Number the sources 0, 1, ... in the order of their names."""
    codes: Items = np.unique([str(source) for source in sources], return_inverse=True)[1].astype(np.int64)
    return codes


def grouped(sources: Mapping[str, Sequence[int | str]]) -> dict[str, list[int | str]]:
    """Return task -> the source of each item, with all sources gathered into groups if they are more than MAX_GROUPS.

    For metrics that are no mean: each is computed once without each source, which is dear for thousands. The groups
    go by the sources' names, so that they are the same for all tasks and splits, and are themselves fair draws.
    """
    if len({str(source) for of_task in sources.values() for source in of_task}) <= MAX_GROUPS:
        return {task: list(of_task) for task, of_task in sources.items()}
    return {task: [_group(str(source)) for source in of_task] for task, of_task in sources.items()}


def _group(source: str) -> int:
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % MAX_GROUPS


def score_of(
    reported: npt.NDArray[Any],
    items: Items,
    sources: Sequence[int | str],
    *,
    aggregate: Aggregate | None = None,
    companion: npt.NDArray[np.float32] | None = None,
) -> Score:
    """Return the score of the items, with a standard error that is clustered by source.

    reported: what the evaluator said of each item; sources: of each item; aggregate: None for the mean. An aggregate
    is called once more for each source (see ``grouped``), and has to be smooth: of a median, the error is a guess.
    Where an item or the score is not finite, neither is the error.
    Raises: CandidateError if the aggregate is not finite without one of the sources, so that its error is unknown.
    """
    codes_N = source_codes(sources)
    with np.errstate(invalid="ignore", over="ignore"):  # a broken model's infinities, or numbers beyond float32
        if aggregate is None:
            value = float(reported.astype(np.float64).mean())
            residuals_N = (reported.astype(np.float64) - value) / len(items)
            items_N = reported.astype(np.float32)  # not by way of the residuals, whose roundings would be seen
        else:
            value = float(aggregate(reported, items))
            residuals_N = (
                _influence(aggregate, reported, items, codes_N) if np.isfinite(value) else np.zeros(len(items))
            )
            items_N = (value + len(items) * residuals_N).astype(np.float32)
    stderr = cluster_error(residuals_N, codes_N) if np.isfinite(items_N).all() else float("nan")
    return Score(value=value, stderr=stderr, items=items_N, companion=companion)


def _influence(aggregate: Aggregate, reported: npt.NDArray[Any], items: Items, codes_N: Items) -> Floats:
    """Return by how much each item moves an aggregate, summing to 0: leave its source out and see.

    Leaving n of N items out moves a mean by -1 / (N - n) times the sum of their deviations from it; so, to first
    order, any smooth aggregate. Items of one source share what it moves.
    """
    num_items = np.bincount(codes_N)
    if len(num_items) < 2:
        return np.zeros(len(codes_N))
    without_S = np.array([aggregate(reported[codes_N != s], items[codes_N != s]) for s in range(len(num_items))])
    if not np.isfinite(without_S).all():
        source = int(np.flatnonzero(~np.isfinite(without_S))[0])
        raise CandidateError(
            f"without {num_items[source]} of {len(codes_N)} items the score is {without_S[source]:g}, "
            "so its standard error is unknown",
            "not finite",
        )
    rest_S = len(codes_N) - num_items
    centre = float((rest_S * without_S).sum() / rest_S.sum())
    influence: Floats = (rest_S * (centre - without_S) / num_items / len(codes_N))[codes_N]
    return influence
