"""Confidence intervals of scores and of paired differences, clustered by source.

Which method where was chosen by its coverage (benchmarks/README.md):

- a score whose items are hits and misses: Wilson's interval (1927), for the number of independent items that the
  clustered ones are worth; no bootstrap sees the misses that a sample of 30 happens not to hold;
- any other score: bootstrap-t over sources (Efron and Tibshirani 1993, 12.5), which follows the skewness of losses;
- a paired difference, which is hardly skewed: Student's t, with one degree of freedom less than sources. Where items
  are won or lost, a quarter of an item more counts as won and a quarter as lost, for the same reason as above.

Shape letters: K models, N items, R resamples, S sources.
"""

from collections.abc import Sequence

import numpy as np

from evomerge.evidence.resampling import by_source, resampled_counts
from evomerge.evidence.scores import source_codes
from evomerge.records import Floats, Items

NUM_RESAMPLES = 2000
LEAST_ERROR = 0.25  # of the sample's own; a resample of equal sources would have none
PSEUDO_ITEMS = 0.25  # won, and as many lost; with half an item (Agresti and Min 2005) the smallest samples cover 98 %


def score_intervals(
    items_KN: Floats, sources: Sequence[int | str], *, level: float = 0.95, drawn: float = 0.0
) -> Floats:
    """Return the intervals (K, 2) of K models' scores on the same items, whose means are the scores.

    drawn: 0 where the items stand for an endless supply; where they stand for the mean over a finite pool, the share of
    the pool's sources that is among them. One source says nothing about others: an endless interval.
    """
    codes_N = source_codes(sources)
    num_sources = int(codes_N.max()) + 1
    if num_sources < 2:
        return _endless(len(items_KN))
    values_K = items_KN.mean(axis=1)
    sums_KS = by_source((items_KN - values_K[:, None]) / len(codes_N), codes_N, num_sources)
    errors_K = _errors(sums_KS)
    binary_K = np.isin(items_KN, (0.0, 1.0)).all(axis=1)
    intervals_K2 = np.empty((len(items_KN), 2))
    for of_kind_K, method in ((binary_K, _wilson), (~binary_K, _bootstrap_t)):
        if of_kind_K.any():
            intervals_K2[of_kind_K] = method(values_K[of_kind_K], errors_K[of_kind_K], sums_KS[of_kind_K], level, drawn)
    return intervals_K2


def difference_intervals(
    gains_KN: Floats, sources: Sequence[int | str], *, level: float = 0.95, drawn: float = 0.0
) -> Floats:
    """Return the intervals (K, 2) of the means of what each of N items gains, in K pairs. drawn: as for scores."""
    codes_N = source_codes(sources)
    num_sources = int(codes_N.max()) + 1
    if num_sources < 2:
        return _endless(len(gains_KN))
    values_K, errors_K = cautious_differences(gains_KN, codes_N, drawn)
    half_K = student(num_sources, level) * errors_K
    return np.stack([values_K - half_K, values_K + half_K], axis=1)


def cautious_differences(gains_KN: Floats, codes_N: Items, drawn: float = 0.0) -> tuple[Floats, Floats]:
    """Return the differences (K,) and their standard errors, with the fractions of items that were won and lost."""
    num_items, num_sources = len(codes_N), int(codes_N.max()) + 1
    pseudo_K = np.where(np.isin(gains_KN, (-1.0, 0.0, 1.0)).all(axis=1), PSEUDO_ITEMS * (1 - drawn), 0.0)
    total_K = num_items + 2 * pseudo_K
    values_K = gains_KN.sum(axis=1) / total_K
    sums_KS = by_source((gains_KN - values_K[:, None]) / total_K[:, None], codes_N, num_sources)
    of_pseudo_K = pseudo_K * ((1 - values_K) ** 2 + (1 + values_K) ** 2) / total_K**2
    return values_K, np.sqrt((_errors(sums_KS) ** 2 + of_pseudo_K) * (1 - drawn))


def student(num_sources: int, level: float) -> float:
    """Return how many standard errors lie on each side of the middle in an interval of this level."""
    from scipy.special import stdtrit

    return float(stdtrit(num_sources - 1, (1 + level) / 2))


def _errors(sums_KS: Floats) -> Floats:
    """``cluster_error`` of K sums at once, by what each source contributes."""
    num_sources = sums_KS.shape[1]
    if num_sources < 2:
        return np.full(len(sums_KS), np.inf)
    errors_K: Floats = np.sqrt(num_sources / (num_sources - 1) * (sums_KS**2).sum(axis=1))
    return errors_K


def _wilson(values_K: Floats, errors_K: Floats, sums_KS: Floats, level: float, drawn: float) -> Floats:
    """Return the proportions (K, 2) that lie just within so many of their own standard errors of what was seen."""
    num_sources = sums_KS.shape[1]
    worth_K = np.full(len(values_K), float(num_sources))  # independent items; where all are alike, one a source
    np.divide(values_K * (1 - values_K), errors_K**2, out=worth_K, where=errors_K > 0)
    pull_K = student(num_sources, level) ** 2 * (1 - drawn) / worth_K
    middle_K = (values_K + pull_K / 2) / (1 + pull_K)
    half_K = np.sqrt(pull_K * values_K * (1 - values_K) + pull_K**2 / 4) / (1 + pull_K)
    return np.stack([middle_K - half_K, middle_K + half_K], axis=1)


def _bootstrap_t(values_K: Floats, errors_K: Floats, sums_KS: Floats, level: float, drawn: float) -> Floats:
    """Return the intervals (K, 2) by the quantiles of a resample's deviation over its own standard error."""
    num_sources = sums_KS.shape[1]
    ratios = []
    for counts_RS in resampled_counts(num_sources, NUM_RESAMPLES):
        moved_RK = counts_RS @ sums_KS.T
        squares_RK = counts_RS @ (sums_KS**2).T - moved_RK**2 / num_sources
        errors_RK = np.sqrt(num_sources / (num_sources - 1) * np.maximum(squares_RK, 0.0))
        errors_RK = np.maximum(errors_RK, LEAST_ERROR * errors_K)
        ratios.append(np.divide(moved_RK, errors_RK, out=np.zeros_like(moved_RK), where=errors_RK > 0))
    ends_2K = np.quantile(np.concatenate(ratios), [(1 + level) / 2, (1 - level) / 2], axis=0)
    intervals_K2: Floats = (values_K - ends_2K * errors_K * np.sqrt(1 - drawn)).T
    return intervals_K2


def _endless(num_models: int) -> Floats:
    return np.tile([-np.inf, np.inf], (num_models, 1))
