"""The race: a candidate is scored on more and more items, until it is stopped or all are scored.

It is stopped as soon as it can be expected to add next to nothing to the hypervolume of what is finished, given its
estimates and their errors: what would land beyond a floor or ceiling, below the reference point, or where a finished
model is better in everything adds nothing. The expectation is of draws from independent normal distributions of the
objectives; as no chance of a mistake is spent, nothing is to be corrected for the number of looks.
Shape letters: S draws, M objectives that steer, N models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from evomerge.evidence.scores import score_of
from evomerge.fidelity.estimator import Estimator
from evomerge.fidelity.irt import ItemResponses
from evomerge.fidelity.paired import Paired
from evomerge.fidelity.rounds import Sources, difficulty, make_rounds
from evomerge.front.front import maximized, violation, worst_of_inputs
from evomerge.front.improvement import Improvement
from evomerge.records import Floats, Measurement, Objective, Options, Score, TaskItems

NUM_DRAWS = 64


class RaceOptions(Options):
    """How candidates are raced.

    start: share of the search items in the first round; factor: growth of that share from round to round; gain: a
    candidate that can be expected to add less than this share of the hypervolume is stopped; above: the hypervolume's
    reference point, the base's scores, or in every objective the worst of base and experts, also in place of the
    base while no finished trial is better than the base in every objective; estimator: of what all items would give.
    """

    start: float = Field(default=0.05, gt=0, lt=1)
    factor: float = Field(default=1.3, gt=1)
    gain: float = Field(default=0.001, ge=0, lt=1)
    above: Literal["base", "worst"] = "base"
    estimator: Literal["paired", "irt"] = "paired"


class Race:
    """Which items next, when to stop, and what a stopped candidate is worth; one for all candidates of a run.

    objectives: all of the campaign's; what is measured are means over items. items: the search items, ascending, with
    the sources of each. references: the reference models on all of them, ``base`` among them; they put the items in
    order. Raises: CampaignError if the estimator does not suit an objective.
    """

    def __init__(
        self,
        options: RaceOptions,
        objectives: Sequence[Objective],
        items: TaskItems,
        sources: Sources,
        references: Mapping[str, Measurement],
        seed: int,
    ) -> None:
        from scipy.special import ndtri
        from scipy.stats.qmc import Sobol

        self._options, self._objectives = options, objectives
        self._measured = [objective for objective in objectives if not objective.summary]
        self._items, self._references = items, frozenset(references)
        models = list(references.values())
        self.rounds = make_rounds(items, sources, difficulty(models, self._measured), _shares(options), seed)
        kind = ItemResponses if options.estimator == "irt" else Paired
        self._estimator: Estimator = kind(self._measured, self.rounds)
        sobol_SM = Sobol(len(objectives), rng=np.random.default_rng(0)).random(
            NUM_DRAWS
        )  # the same for every candidate
        self._normal_SM: Floats = ndtri(sobol_SM)
        self._spanned: tuple[frozenset[str], Improvement] | None = None
        self._estimator.estimates(self.rounds.beginning(models[0], self._measured, 1), models)  # or it is refused now

    def next_items(self, partial: Measurement | None = None) -> TaskItems | None:
        """Return the items of the next round (the first, before anything is scored), or None if all are scored."""
        num_done = self._num_done(partial) if partial else 0
        return self.rounds.added[num_done] if num_done < len(self.rounds.added) else None

    def joined(self, first: Measurement, second: Measurement) -> Measurement:
        """Return the measurement of the rounds up to now and that of the next as one.

        Items stand in the order of scoring until all are scored, from then on in that of the split.
        """
        scores = {
            objective.name: self._joined(objective.task, first.scores[objective.name], second.scores[objective.name])
            for objective in self._measured
        }
        parts = [*first.seconds, *(part for part in second.seconds if part not in first.seconds)]
        seconds = {part: first.seconds.get(part, 0.0) + second.seconds.get(part, 0.0) for part in parts}
        halved = first.halved or second.halved
        return replace(first, scores=scores, cost=first.cost + second.cost, seconds=seconds, halved=halved)

    def estimate(self, partial: Measurement, finished: Mapping[str, Measurement]) -> Measurement:
        """Return what all items would give, were the candidate stopped now.

        A standard error says how far the value on all search items may be from the estimate. finished: the reference
        models and the trials that are scored on all items, in the order in which they came.
        """
        estimates = self._estimator.estimates(partial, list(finished.values()))
        scores = {
            name: replace(partial.scores[name], value=estimate.value, stderr=estimate.stderr)
            for name, estimate in estimates.items()
        }
        share = self.rounds.share(self._num_done(partial))
        return replace(partial, scores=scores, stopped=f"after {share:.0%} of the items")

    def verdict(self, estimate: Measurement, finished: Mapping[str, Measurement]) -> str | None:
        """Return why a candidate is to be stopped, or None; all measurements with the summaries' scores.

        The first trial of a run is never stopped, so that there is a front.
        """
        if finished.keys() <= self._references:
            return None
        reason = self._reason(estimate, finished)
        return f"{estimate.stopped}: {reason}" if reason else None

    def _reason(self, estimate: Measurement, finished: Mapping[str, Measurement]) -> str | None:
        draws = {
            objective.name: estimate.scores[objective.name].value + estimate.scores[objective.name].stderr * normal_S
            for objective, normal_S in zip(self._objectives, self._normal_SM.T, strict=True)
        }
        is_kept_S = np.ones(NUM_DRAWS, dtype=np.bool_)
        for objective in self._objectives:
            values_S = draws[objective.name]
            is_kept_S &= [min(objective.margins(value), default=0.0) >= 0 for value in values_S]
            if not is_kept_S.any():
                missed = "floor" if objective.floor is not None and values_S.mean() < objective.floor else "ceiling"
                return f"{objective.name} misses its {missed} of {getattr(objective, missed):g}"
        front = self._front(finished)
        steering = [objective for objective in self._objectives if objective.steers]
        values_SM = np.stack([objective.sign * draws[objective.name] for objective in steering], axis=1)
        gain = float(np.where(is_kept_S, front.gains(values_SM), 0.0).mean())
        if gain > self._options.gain * front.volume:
            return None
        return f"it can be expected to add {gain / max(front.volume, 1e-300):.2g} of the hypervolume"

    def _front(self, finished: Mapping[str, Measurement]) -> Improvement:
        """Return what the finished models span; made anew only when there are more of them."""
        if self._spanned is None or self._spanned[0] != finished.keys():
            self._spanned = frozenset(finished), self._span(finished)
        return self._spanned[1]

    def _span(self, finished: Mapping[str, Measurement]) -> Improvement:
        useful = {
            name: maximized(model, self._objectives)
            for name, model in finished.items()
            if not violation(model, self._objectives)
        }
        base_M = maximized(finished["base"], self._objectives)
        # Reference models do not count: an average may beat the base by a hair in everything where nothing else does.
        is_passed = any((useful[name] > base_M).all() for name in useful.keys() - self._references)
        reference_M = base_M
        if self._options.above == "worst" or not is_passed:
            reference_M = worst_of_inputs(finished, self._objectives)
        values_NM = np.array([*useful.values()]).reshape(len(useful), len(reference_M))
        return Improvement(values_NM, reference_M)

    def _num_done(self, partial: Measurement) -> int:
        objective = self._measured[0]
        return self.rounds.num_done(objective.task, len(partial.scores[objective.name].items))

    def _joined(self, task: str, first: Score, second: Score) -> Score:
        positions = self.rounds.positions[task][: len(first.items) + len(second.items)]
        is_complete = len(positions) == len(self._items[task])
        order = np.argsort(positions) if is_complete else np.arange(len(positions))
        companion = None
        if first.companion is not None and second.companion is not None:
            companion = np.concatenate([first.companion, second.companion])[order]
        positions = positions[order]
        return score_of(
            np.concatenate([first.items, second.items])[order],
            self._items[task][positions],
            [self.rounds.sources[task][position] for position in positions],
            companion=companion,
        )


def _shares(options: RaceOptions) -> list[float]:
    """Return the shares of the items after each round but the last."""
    num_rounds = int(np.ceil(np.log(1 / options.start) / np.log(options.factor) - 1e-9))
    return [options.start * options.factor**number for number in range(num_rounds)]
