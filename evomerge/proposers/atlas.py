"""aTLAS: gradient steps on one coefficient a tensor and expert, from 0, down the loss of the adapt items' labels.

    c <- AdamW step down L(c) = sum_t mean_x CE(x; c), from c = 0

Gradients are clipped to length 1.
When to use: labels, one coefficient a tensor or more (``groups: tensor``, ``operator: {name: partitioned, classes:
K}``), and some hundred steps; weight decay holds coefficients that do not help near 0, which suits large pools of
experts. Not where few adapt items have to tell many coefficients, nor for a front.
Reference: Zhang et al. 2024, aTLAS, arxiv.org/abs/2407.02880: AdamW of weight decay 0.1 with rate 1e-3, on batches of
128 items of all tasks together. The paper's coefficients are ``groups: tensor`` with a range that holds 0; its "aTLAS x
K" goes with ``partitioned``.
Departures: coefficients stay in their range (the paper's are free), and which trial was best is for the search items to
say, not for the items that train.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from evomerge.proposers.legs import DescentOptions, Legs, with_coefficients
from evomerge.proposers.proposer import Problem
from evomerge.records import BACKWARD_COST, Descent, Floats, Options

WEIGHT_DECAY = 0.1
CLIP = 1.0


class AtlasOptions(DescentOptions):
    """loss: what descends; steps: a trial's; learning_rate: in units of the coefficients; batch_size: of all tasks."""

    loss: Literal["ce", "entropy"] = "ce"
    batch_size: int = Field(default=128, ge=1)

    @property
    def named_loss(self) -> str:
        """The one that is chosen."""
        return self.loss

    def num_forwards(self, num_adapt: Mapping[str, int], num_trials: int) -> float:
        """Each task has an equal part of the batch."""
        part = self.part(len(num_adapt))
        return BACKWARD_COST * num_trials * self.steps * sum(min(part, num) for num in num_adapt.values())

    def part(self, num_tasks: int) -> int:
        """Return how many items of each task a batch holds."""
        return max(1, self.batch_size // num_tasks)


class Atlas(Legs):
    """AdamW on the coefficients, from 0. Raises: CampaignError if a coefficient's range does not hold 0."""

    name: ClassVar[str] = "atlas"
    options_type: ClassVar[type[Options]] = AtlasOptions

    def __init__(self, problem: Problem, options: AtlasOptions) -> None:
        self.options = options
        super().__init__(problem)

    def start(self) -> Floats:
        """All coefficients are 0."""
        return with_coefficients(self.problem, self.name, 0.0)

    def leg(self, seed: tuple[int, ...]) -> Descent:
        """AdamW with the paper's numbers."""
        return Descent(
            loss=self.options.loss,
            steps=self.options.steps,
            learning_rate=self.options.learning_rate,
            batch_size=self.options.part(len(self.problem.tasks)),
            seed=seed,
            weight_decay=WEIGHT_DECAY,
            clip=CLIP,
        )
