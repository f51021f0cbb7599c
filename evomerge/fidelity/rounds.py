"""The rounds of a race: nested sets of items, the same for all candidates, every one of them representative.

Shape letters: N items, S sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from evomerge.evidence.scores import score_of, source_codes
from evomerge.records import Floats, Items, Measurement, Objective, TaskItems

Sources = Mapping[str, Sequence[int | str]]
"""Task -> the source of each of its items."""


@dataclass(frozen=True)
class Rounds:
    """Which items each round adds, task by task, ascending within a round; all rounds together hold every item once."""

    added: tuple[TaskItems, ...]
    sources: Sources
    """Of all items of a task, ascending."""

    @cached_property
    def positions(self) -> dict[str, Items]:
        """Task -> where each item, in the order of scoring, stands among all items, ascending; shape (N,)."""
        return {
            task: np.argsort(np.argsort(np.concatenate([round_[task] for round_ in self.added])))
            for task in self.added[0]
        }

    @cached_property
    def codes(self) -> dict[str, Items]:
        """Task -> the sources of all items, numbered from 0; shape (N,)."""
        return {task: source_codes(of_task) for task, of_task in self.sources.items()}

    @property
    def num_items(self) -> int:
        """Of all rounds and tasks together."""
        return sum(map(len, self.positions.values()))

    def num_done(self, task: str, num_items: int) -> int:
        """How many rounds a candidate has run that is scored on so many items of a task."""
        ends = np.cumsum([len(round_[task]) for round_ in self.added])
        return int(np.searchsorted(ends, num_items)) + 1

    def num_sources(self, num_rounds: int) -> int:
        """Of the first rounds, in the task that has the fewest."""
        return min(len(np.unique(self.codes[task][self._beginning(task, num_rounds)])) for task in self.positions)

    def beginning(self, measurement: Measurement, objectives: Sequence[Objective], num_rounds: int) -> Measurement:
        """Return what a measurement on all items would have been after the first rounds."""
        scores = {}
        for objective in objectives:
            score, first = measurement.scores[objective.name], self._beginning(objective.task, num_rounds)
            companion = None if score.companion is None else score.companion[first]
            sources = [self.sources[objective.task][position] for position in first]
            scores[objective.name] = score_of(score.items[first], first, sources, companion=companion)
        return replace(measurement, scores=scores, cost=measurement.cost * self.share(num_rounds))

    def _beginning(self, task: str, num_rounds: int) -> Items:
        return self.positions[task][: sum(len(round_[task]) for round_ in self.added[:num_rounds])]

    def share(self, num_rounds: int) -> float:
        """Share of the items of all tasks in the first rounds."""
        return sum(len(items) for round_ in self.added[:num_rounds] for items in round_.values()) / self.num_items


def make_rounds(
    items: TaskItems, sources: Sources, difficulty: Mapping[str, Floats], shares: Sequence[float], seed: int
) -> Rounds:
    """Cut the items of every task into nested sets of about these shares (ascending, below 1) of the sources, then all.

    sources and difficulty are of all items of a task, ascending. The items of a source stay together. A share that
    would add fewer than two sources to a task is left out, as is one that would leave fewer: what a round adds is
    scored by itself, and one source says nothing about others.
    """
    codes = {task: source_codes(sources[task]) for task in items}
    orders = {
        task: order_sources(codes[task], difficulty[task], np.random.default_rng([seed, 0xFACE, number]))
        for number, task in enumerate(sorted(items))
    }
    cuts: list[dict[str, int]] = [dict.fromkeys(items, 0)]
    for share in shares:
        cut = {task: max(2, int(np.ceil(share * len(orders[task]) - 1e-9))) for task in items}
        if all(cuts[-1][task] + 2 <= cut[task] <= len(orders[task]) - 2 for task in items):
            cuts.append(cut)
    cuts.append({task: len(orders[task]) for task in items})
    added = tuple(
        {task: items[task][np.isin(codes[task], orders[task][low[task] : high[task]])] for task in items}
        for low, high in pairwise(cuts)
    )
    return Rounds(added, sources)


def order_sources(codes_N: Items, difficulty_N: Floats, rng: np.random.Generator) -> Items:
    """Return the sources 0 to S - 1 in an order of which every beginning is representative, shape (S,).

    Sorted by their items' mean difficulty, equal ones at random, they are visited in van der Corput's order with a
    random shift, which spreads any number of visits evenly.
    """
    mean_S = np.bincount(codes_N, difficulty_N) / np.bincount(codes_N)
    sorted_S = np.lexsort((rng.random(len(mean_S)), mean_S.round(9)))
    bits = int(np.ceil(np.log2(len(mean_S)))) + 1
    numbers = np.arange(2**bits)
    spread = sum(((numbers >> bit) & 1) / 2.0 ** (bit + 1) for bit in range(bits)) + rng.random()
    ranks = np.floor(spread % 1.0 * len(mean_S)).astype(np.int64)
    _, first = np.unique(ranks, return_index=True)
    order_S: Items = sorted_S[ranks[np.sort(first)]].astype(np.int64)
    return order_S


def difficulty(references: Sequence[Measurement], objectives: Sequence[Objective]) -> dict[str, Floats]:
    """Return task -> by how much each item suits the reference models less than the task's others do, (N,).

    The mean over models of each objective's items, in its standard deviations, summed over the objectives of a task.
    """
    of_tasks: dict[str, Floats] = {}
    for objective in objectives:
        mean_N = -objective.sign * np.mean([model.scores[objective.name].items for model in references], axis=0)
        mean_N = mean_N.astype(np.float64) - mean_N.mean(dtype=np.float64)
        of_tasks[objective.task] = of_tasks.get(objective.task, 0.0) + mean_N / max(float(mean_N.std()), 1e-12)
    return of_tasks
