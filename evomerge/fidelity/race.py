"""The race: a candidate is scored on more and more items, until it is stopped or all are scored.

It is stopped as soon as even the best that the confidence allows would be of no use: worse than a finished model in
every objective, beyond a floor or ceiling, or worse than the base where others are better. All of these follow from one
statement, that no objective is better than its limit, which holds for all objectives and looks at once; so there is
nothing to correct for the number of finished models.
Shape letters: L looks, M objectives that steer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from evomerge.evidence.scores import score_of
from evomerge.fidelity.estimator import Estimator
from evomerge.fidelity.irt import ItemResponses
from evomerge.fidelity.paired import PRIOR_FREEDOM, Paired
from evomerge.fidelity.rounds import Sources, difficulty, make_rounds
from evomerge.front.front import maximized, violation
from evomerge.records import Measurement, Objective, Options, Score, TaskItems


class RaceOptions(Options):
    """How candidates are raced.

    start: share of the search items in the first round; factor: growth of that share from round to round; confidence:
    that a candidate is not stopped which all search items would show to be of use; estimator: of what all items would
    give; aim: what is of use, whatever no finished model dominates (front), or what is moreover better than the base in
    every objective, once a finished trial is (hypervolume).
    """

    start: float = Field(default=0.1, gt=0, lt=1)
    factor: float = Field(default=2.0, gt=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    estimator: Literal["paired", "irt"] = "paired"
    aim: Literal["front", "hypervolume"] = "hypervolume"


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
        self._options, self._objectives = options, objectives
        self._measured = [objective for objective in objectives if not objective.summary]
        self._items, self._references = items, frozenset(references)
        models = list(references.values())
        self.rounds = make_rounds(items, sources, difficulty(models, self._measured), _shares(options), seed)
        kind = ItemResponses if options.estimator == "irt" else Paired
        self._estimator: Estimator = kind(self._measured, self.rounds)
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
        return replace(first, scores=scores, cost=first.cost + second.cost, seconds=seconds)

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
        reason = self._reason(self._limits(estimate), finished)
        return f"{estimate.stopped}: {reason} ({self._options.confidence:.0%} confidence)" if reason else None

    def _reason(self, limits: Mapping[tuple[str, int], float], finished: Mapping[str, Measurement]) -> str | None:
        for objective in self._objectives:
            if objective.floor is not None and limits[objective.name, 1] < objective.floor:
                return f"{objective.name} misses its floor of {objective.floor:g}"
            if objective.ceiling is not None and limits[objective.name, -1] > objective.ceiling:
                return f"{objective.name} misses its ceiling of {objective.ceiling:g}"
        steering = [objective for objective in self._objectives if objective.steers]
        best_M = np.array([objective.sign * limits[objective.name, objective.sign] for objective in steering])
        useful = {
            name: maximized(model, self._objectives)
            for name, model in finished.items()
            if not violation(model, self._objectives)
        }
        for name, values_M in useful.items():
            if (values_M > best_M).all():
                return f"{name} is better in every objective"
        base_M = maximized(finished["base"], self._objectives)
        worse = [objective.name for objective, is_worse in zip(steering, best_M < base_M, strict=True) if is_worse]
        # Reference models do not count: an average may beat the base by a hair in everything where nothing else does.
        above = [
            name for name, values_M in useful.items() if name not in self._references and (values_M > base_M).all()
        ]
        if self._options.aim == "hypervolume" and worse and above:
            return f"worse than the base in {worse[0]}"
        return None

    def _limits(self, estimate: Measurement) -> dict[tuple[str, int], float]:
        """Return (objective, side) -> the limit above (+1) or below (-1), for all by which a candidate is judged.

        The chance of a mistake is shared among the limits equally, and among the looks by what a stop there spares.
        """
        from scipy.stats import t as student

        sides = [(objective.name, objective.sign) for objective in self._objectives if objective.steers]
        sides += [(objective.name, 1) for objective in self._objectives if objective.floor is not None]
        sides += [(objective.name, -1) for objective in self._objectives if objective.ceiling is not None]
        num_done = self._num_done(estimate)
        spared_L = 1 - np.array([self.rounds.share(look) for look in range(1, len(self.rounds.added))])
        chance = (1 - self._options.confidence) * spared_L[num_done - 1] / spared_L.sum() / len(set(sides))
        width = float(student.isf(chance, self.rounds.num_sources(num_done) - 1 + PRIOR_FREEDOM))
        scores = estimate.scores
        return {(name, side): scores[name].value + side * width * scores[name].stderr for name, side in sides}

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
