"""What an evaluator is: it scores the items asked for and decides nothing.

Built once a campaign; all that does not depend on the weights (files, tokens, batches) is kept.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from evomerge.records import Direction, Items

ItemScores = dict[str, npt.NDArray[np.float32]]
"""Metric -> one score an item, in the order of the items asked for."""


class Evaluator(Protocol):
    """Scores a model on the items of named tasks."""

    losses: frozenset[str]
    """Names of the differentiable losses: ``ce`` (of the right answer), ``entropy`` (of the prediction)."""

    @property
    def sources(self) -> Mapping[str, Sequence[int | str]]:
        """Task -> the source of each of its items; items of one source never part in a split."""

    @property
    def digest(self) -> str:
        """SHA-256 of the items: a run's scores compare only while it stays the same."""

    def metrics(self, task: str) -> Mapping[str, Direction]:
        """Return the metrics that ``score`` reports for a task, and which way is better."""

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Score the items; every metric of the task, float32, one number an item."""

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Return the mean of a named loss over the items, in nats, differentiable in the model's parameters."""


def digest_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files' contents, in their order."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
