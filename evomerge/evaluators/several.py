"""Several evaluators in one campaign, each scoring its own tasks."""

from collections.abc import Mapping, Sequence
from copy import copy

from torch import Tensor, nn

from evomerge.evaluators.evaluator import Evaluator, ItemScores, Metric, Predictor
from evomerge.records import Items, digest


class SeveralEvaluators:
    """Hands every task to the evaluator that scores it.

    parts: task -> its evaluator; at least one. Sources of one name are one source for all of them.
    """

    def __init__(self, parts: Mapping[str, Evaluator]) -> None:
        self._parts = dict(parts)
        self.sources: Mapping[str, Sequence[int | str]] = {task: part.sources[task] for task, part in parts.items()}
        self.digest = digest({task: part.digest for task, part in parts.items()})

    @property
    def losses(self) -> frozenset[str]:
        """The losses that all of them have: a descent follows their sum."""
        return frozenset.intersection(*(part.losses for part in self._parts.values()))

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """Those of the task's evaluator."""
        return self._parts[task].metrics(task)

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Score items of one task."""
        return self._parts[task].score(model, task, items)

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Return the mean loss over items of one task."""
        return self._parts[task].loss(model, task, items, name)

    def halved(self) -> "SeveralEvaluators":
        """Halve the batches of each."""
        twin = copy(self)
        twin._parts = {task: part.halved() for task, part in self._parts.items()}
        return twin

    def logits(self, model: nn.Module, task: str, items: Items) -> list[Tensor]:
        """Return the predictions of items of one task."""
        part = self._parts[task]
        assert isinstance(part, Predictor)
        return part.logits(model, task, items)
