"""The winner's curse: the best of many looks better than it is, on the items that it was picked by.

Shape letters: M objectives, N candidates, S sources.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.evidence.compare import maximized_items
from evomerge.evidence.resampling import contributions, resampled_counts
from evomerge.evidence.summary import Sources
from evomerge.records import Floats, Measurement, Objective

NUM_RESAMPLES = 500
OLD_NOISE = 2**0.5


def optimism_of_best(
    measurements: Sequence[Measurement], objectives: Sequence[Objective], sources: Sources
) -> dict[str, float]:
    """Return, by objective, by how much the candidate with the best mean over objectives must look better than it is.

    The mean of these numbers is the optimism of the mean. Candidates that were stopped are left out: nobody picks
    them. What the search learned from the same items on its way to the candidates is not counted.
    """
    whole = [measurement for measurement in measurements if measurement.stopped is None]
    items = [np.stack([maximized_items(measurement, objective) for measurement in whole]) for objective in objectives]
    values_N = np.mean([items_N.mean(axis=1) for items_N in items], axis=0)
    sums_MNS = contributions(items, [sources[objective.name] for objective in objectives])
    luck = _luck_of_best(values_N, sums_MNS.mean(axis=0))
    optimism_M = OLD_NOISE * np.sum([sums_MNS[:, n] @ counts_S for n, counts_S in luck.items()], axis=0)
    return dict(zip((objective.name for objective in objectives), optimism_M.tolist(), strict=True))


def expected_optimism(values_N: Floats, sums_NS: Floats) -> float:
    """Return by how much the best of N candidates must look better than it is.

    values_N: what it is picked by, larger is better; sums_NS: what each source adds to it, summing to 0. The sources
    are drawn anew, and the best is picked as it then looks: that moves it up by a part of the noise only, since the
    values hold the same noise already. Of equal candidates the part is 1 in the square root of 2, which is made up for
    here; of candidates that lie well apart it is more, and the number then errs upwards, by less than half.
    """
    return OLD_NOISE * sum(float(sums_NS[n] @ counts_S) for n, counts_S in _luck_of_best(values_N, sums_NS).items())


def _luck_of_best(values_N: Floats, sums_NS: Floats) -> Mapping[int, Floats]:
    """Return candidate -> how often each source was drawn (S,) when it came out best, over the number of resamples."""
    luck: dict[int, Floats] = defaultdict(lambda: np.zeros(sums_NS.shape[1]))
    for counts_RS in resampled_counts(sums_NS.shape[1], NUM_RESAMPLES):
        best_R = (values_N + counts_RS @ sums_NS.T).argmax(axis=1)
        for n in np.unique(best_R):
            luck[int(n)] += counts_RS[best_R == n].sum(axis=0) / NUM_RESAMPLES
    return luck
