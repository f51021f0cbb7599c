"""The estimator ``paired``: the most similar finished models on all items, plus the difference from them on the first.

Items are hard or easy for similar models alike, so the difference from such models varies less than the score itself: a
difference estimator (Cochran 1977, 7.3) whose control is the mean of similar models. Which models are similar is judged
by the items of all objectives together, so that hardly any of it is luck with one objective's few items.
Shape letters: F finished models, N items of all, n items of the first, S sources.
"""

from collections.abc import Sequence

import numpy as np

from evomerge.evidence.scores import cluster_error
from evomerge.fidelity.estimator import Estimate, item_numbers
from evomerge.fidelity.rounds import Rounds
from evomerge.records import Floats, Items, Measurement, Objective

NUM_SIMILAR = 8
PRIOR_FREEDOM = 10  # degrees of freedom that the similar models' own variance counts for


class Paired:
    """Estimates by the paired difference from similar models."""

    def __init__(self, objectives: Sequence[Objective], rounds: Rounds) -> None:
        self._objectives, self._rounds = objectives, rounds

    def estimates(self, partial: Measurement, finished: Sequence[Measurement]) -> dict[str, Estimate]:
        """Return objective -> estimate; the error is that of what the search items would give, not of any items."""
        ours = {objective.name: item_numbers(partial, objective) for objective in self._objectives}
        theirs = {
            objective.name: np.stack([item_numbers(model, objective) for model in finished])
            for objective in self._objectives
        }
        first = {
            objective.name: self._rounds.positions[objective.task][: len(ours[objective.name])]
            for objective in self._objectives
        }
        chosen = _most_similar([np.abs(theirs[name][:, first[name]] - ours[name]).mean(axis=1) for name in ours])
        return {
            objective.name: _estimate(
                ours[objective.name],
                theirs[objective.name][chosen],
                first[objective.name],
                self._rounds.codes[objective.task],
            )
            for objective in self._objectives
        }


def _most_similar(distances: Sequence[Floats]) -> Items:
    """Return the nearest models by their distances (F,) in each objective, each as a share of the mean distance."""
    total_F = np.sum([distance_F / max(float(distance_F.mean()), 1e-12) for distance_F in distances], axis=0)
    nearest: Items = np.argsort(total_F, kind="stable")[:NUM_SIMILAR]
    return nearest


def _estimate(ours_n: Floats, similar_FN: Floats, first_n: Items, codes_N: Items) -> Estimate:
    """Estimate one objective; the variance between few sources is moderated by what it is among the similar models.

    With s^2 a source's share in the variance of the difference, at S - 1 degrees of freedom, and s0^2 that of the
    models from each other on all items, it is ((S - 1) s^2 + d0 s0^2) / (S - 1 + d0), d0 = PRIOR_FREEDOM (Smyth 2004,
    with d0 given): a few differences that happen to be equal are no certainty. Sources are drawn without replacement,
    hence 1 / S - 1 / (number of all sources).
    """
    control_N = similar_FN.mean(axis=0)
    difference_n = ours_n - control_N[first_n]
    num_sources, num_all = len(np.unique(codes_N[first_n])), int(codes_N.max()) + 1
    freedom = num_sources - 1
    seen = _source_variance(difference_n, codes_N[first_n])
    prior = np.mean([_source_variance(model_N, codes_N) for model_N in _from_the_others(similar_FN)])
    variance = (freedom * seen + PRIOR_FREEDOM * prior) / (freedom + PRIOR_FREEDOM)
    stderr = float(np.sqrt(variance * (1 / num_sources - 1 / num_all)))
    return Estimate(float(difference_n.mean() + control_N.mean()), stderr)


def _from_the_others(similar_FN: Floats) -> Floats:
    """Return each model's difference from the mean of the others, (F, N)."""
    num_models = len(similar_FN)
    differences_FN: Floats = (similar_FN - similar_FN.mean(axis=0)) * num_models / (num_models - 1)
    return differences_FN


def _source_variance(numbers_N: Floats, codes_N: Items) -> float:
    """Return the squared standard error of a mean times the number of its sources."""
    codes_N = np.unique(codes_N, return_inverse=True)[1]
    return cluster_error((numbers_N - numbers_N.mean()) / len(numbers_N), codes_N) ** 2 * (int(codes_N.max()) + 1)
