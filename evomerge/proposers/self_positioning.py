"""Self Positioning: where to stand between the experts, and how far from the base, by SGD on a small labelled set.

    c_k = s softmax(a)_k
    a, s <- SGD step down L(c) + penalty mean s^2

There is a number a_k an expert and a scale s, one of each for every group of the space (the paper's are ``groups:
model``). The loss is that of the adapt items' labels, which for embeddings is contrastive; the mean is over groups. It
begins at the average of the experts.
When to use: labels, one objective or the mean of several, and shares that should stay positive and comparable, as
between embedding models. Not for a front, and not where a coefficient should be negative.
Reference: Li et al. 2024, arxiv.org/abs/2410.15035. Its formula and its numbers are not repeated here: this is the
family of merges that its abstract describes, and rate and penalty are our own.
"""

from typing import ClassVar

from pydantic import Field

from evomerge.proposers.legs import DescentOptions, Legs, with_coefficients
from evomerge.proposers.proposer import Problem
from evomerge.records import Descent, Floats, Options


class SelfPositioningOptions(DescentOptions):
    """steps: a trial's; learning_rate: of a and s; batch_size: items a task; penalty: on the mean of s^2."""

    learning_rate: float = Field(default=0.1, gt=0)
    penalty: float = Field(default=0.01, ge=0)


class SelfPositioning(Legs):
    """SGD on shares and scales. Raises: CampaignError if a range of a coefficient does not hold 0 and 1."""

    name: ClassVar[str] = "self_positioning"
    options_type: ClassVar[type[Options]] = SelfPositioningOptions

    def __init__(self, problem: Problem, options: SelfPositioningOptions) -> None:
        self.options = options
        super().__init__(problem)

    def start(self) -> Floats:
        """The average of the experts."""
        return with_coefficients(self.problem, self.name, 1 / len(self.problem.experts), 0.0, 1.0)

    def leg(self, seed: tuple[int, ...]) -> Descent:
        """SGD on a and s."""
        return Descent(
            rule="scaled_softmax",
            loss="ce",
            steps=self.options.steps,
            learning_rate=self.options.learning_rate,
            batch_size=self.options.batch_size,
            penalty=self.options.penalty,
            seed=seed,
        )
