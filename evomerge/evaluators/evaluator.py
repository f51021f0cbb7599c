"""What an evaluator is: it scores the items asked for and decides nothing.

Built once a campaign; all that does not depend on the weights (files, tokens, batches) is kept. A new kind is one file
with such a class, one entry in ``assemble.EVALUATORS``, and a test class that inherits ``evaluator_contract.py``.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evomerge.records import Direction, Items

ItemScores = dict[str, npt.NDArray[Any]]
"""Metric -> one score an item, shape (N,), in the order of the items asked for.

float32 where the score of the task is the mean over items; else whatever the metric's ``aggregate`` takes. Under
``loss``, or ``loss:<metric>``, stands the smooth companion: minus the log-probability of the right answer, in nats.
"""

Wanted = Mapping[str, Sequence[str]]
"""Task -> the metrics that the campaign's objectives ask for."""

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Metric:
    """Which way a metric is better (None where only the campaign can say), and how items make a task's score.

    aggregate: (what ``score`` reports of the items, the items) -> the task's score; None is the mean. follows_loss:
    whether a model with a smaller ``loss`` may be expected to be better; if not, only ``loss:<metric>`` is a companion.
    """

    direction: Direction | None
    aggregate: Callable[[npt.NDArray[Any], Items], float] | None = None
    follows_loss: bool = True


class Evaluator(Protocol):
    """Scores a model on the items of named tasks."""

    @property
    def losses(self) -> frozenset[str]:
        """Names of the differentiable losses: ``ce`` (of the right answer), ``entropy`` (of the prediction).

        ``kl`` (of the prediction, from an expert's) is made from what a ``Predictor`` says; ``loss`` is not asked it.
        """

    @property
    def sources(self) -> Mapping[str, Sequence[int | str]]:
        """Task -> the source of each of its items; items of one source never part in a split."""

    @property
    def digest(self) -> str:
        """SHA-256 of all that makes the scores but the weights: a run's scores compare only while it stays the same."""

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """Return the metrics that ``score`` reports for a task."""

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Score the items: every metric of the task, and the companion where there is one.

        What one model does to one item is no reason to raise: it scores NaN, and the candidate fails with that reason.
        """

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Return the mean of a named loss over the items, in nats, differentiable in the model's parameters."""

    def halved(self) -> "Evaluator":
        """Return one that scores the same in batches of half the size, for a candidate that does not fit memory."""


@runtime_checkable
class Predictor(Evaluator, Protocol):
    """An evaluator whose ``losses`` hold ``kl``: it says what predictions are made from."""

    def logits(self, model: nn.Module, task: str, items: Items) -> list[Tensor]:
        """Return what each item's prediction is made from, (rows, classes) float32, differentiable in the parameters.

        A row is a choice among classes: of an item, or of each token that is scored.
        """


def divergence(teacher: Sequence[Tensor], logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Return the mean over items of T^2 KL(teacher || model), itself the mean over an item's rows, nats.

    Shapes: of each item (rows, classes). Both are softened by the temperature T, whose square keeps the size of the
    gradient. Reference: Hinton et al. 2015, arxiv.org/abs/1503.02531, section 2.
    """
    parts = []
    for taught_RC, logits_RC in zip(teacher, logits, strict=True):
        taught, own = ((held / temperature).log_softmax(-1) for held in (taught_RC.to(logits_RC), logits_RC))
        parts.append((taught.exp() * (taught - own)).sum(-1).mean())
    return temperature**2 * torch.stack(parts).mean()


def half(batch_size: int) -> int:
    """Return half of a batch size, at least one item."""
    return max(1, batch_size // 2)


def companion_of(name: str, metric: Metric, scores: ItemScores) -> npt.NDArray[np.float32] | None:
    """Return the smooth companion of a metric among what an evaluator reported, if there is one."""
    found: npt.NDArray[np.float32] | None = scores.get(
        f"{LOSS}:{name}", scores.get(LOSS) if metric.follows_loss else None
    )
    return found


def digest_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files' contents, in their order."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
