"""Experts that teach: what each says itself of a few adapt items, and how far the resident model is from that.

Shape letters: R rows of an item, C classes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evomerge.campaign.plan import Plan
from evomerge.evaluators.evaluator import Predictor, divergence
from evomerge.materialize.materializer import Materializer
from evomerge.operators.linear import TaskArithmetic
from evomerge.records import Descent, Items
from evomerge.space.groups import block_modules


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says of an item: logits (R, C), and what some of its blocks give out, in the order of their runs."""

    logits_RC: Tensor
    hidden: tuple[Tensor, ...] = ()


class Teachers:
    """Experts' own answers to adapt items, for losses named ``kl:<expert>``; each is made once, and kept."""

    def __init__(self, plan: Plan, materializer: Materializer) -> None:
        self._plan, self._materializer = plan, materializer
        self._operator = TaskArithmetic()
        self._held: dict[tuple[str, str, int, tuple[int, ...]], Answer] = {}

    def prepare(self, expert: str, task: str, items: Items, layers: tuple[int, ...]) -> None:
        """Have the expert answer the items; the resident model may be that expert afterwards."""
        missing = np.array([item for item in items.tolist() if (expert, task, item, layers) not in self._held])
        if not len(missing):
            return
        recipe = self._plan.task_arithmetic([float(name == expert) for name in self._plan.experts])
        self._materializer.build(self._operator, recipe)
        with torch.no_grad():
            answers = self._answers(task, missing, layers)
        for item, answer in zip(missing.tolist(), answers, strict=True):
            hidden = tuple(part.cpu() for part in answer.hidden)
            self._held[expert, task, item, layers] = Answer(answer.logits_RC.cpu(), hidden)

    def loss(self, expert: str, task: str, items: Items, descent: Descent) -> Tensor:
        """Return how far the resident model is from the expert, the mean over the items.

        That is the divergence of its predictions, and ``alignment`` times the mean squared difference of what the
        descent's layers give out.
        """
        taught = [self._held[expert, task, item, descent.layers] for item in items.tolist()]
        own = self._answers(task, items, descent.layers)
        loss = divergence([one.logits_RC for one in taught], [one.logits_RC for one in own], descent.temperature)
        if not descent.layers:
            return loss
        pairs = zip(
            (part for answer in taught for part in answer.hidden),
            (part for answer in own for part in answer.hidden),
            strict=True,
        )
        squares = [(other.float() - one.to(other.device).float()).square().mean() for one, other in pairs]
        # Layers may lie on several devices.
        return loss + descent.alignment * torch.stack([square.to(loss.device) for square in squares]).mean()

    def _answers(self, task: str, items: Items, layers: tuple[int, ...]) -> list[Answer]:
        evaluator, model = self._plan.evaluator, self._materializer.module
        assert isinstance(evaluator, Predictor)
        if not layers:
            return [Answer(logits_RC) for logits_RC in evaluator.logits(model, task, items)]
        modules = block_modules(tensor.name for tensor in self._plan.tensors)
        watched = [model.get_submodule(name) for layer in layers for name in modules[layer]]
        answers = []
        for item in items:  # one by one: in a batch, items are padded as the others want it
            with _outputs_of(watched) as hidden:
                (logits_RC,) = evaluator.logits(model, task, np.array([item]))
            answers.append(Answer(logits_RC, tuple(hidden)))
        return answers


@contextmanager
def _outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Gather what modules give out, in the order in which they run; of several things, the first."""
    outputs: list[Tensor] = []

    def gather(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(gather) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
