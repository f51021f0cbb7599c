"""FW-Merging: Frank-Wolfe steps within the convex hull of the experts, down the loss of the adapt items' labels.

    hard: c <- c + 2 factor / (t + 2) (v - c), v = argmin <grad L(c), v> over vertices
    soft: c <- (1 - sum_j w_j) c + sum_j w_j e_j, an expert e_j a task, w by Adam

Each step goes towards the experts whose task vectors the gradient falls to most, so that experts that help no task are
never stepped towards, however many there are. The hull is one a group: what the paper calls layer-wise is ``groups:
tensor``, task-wise ``groups: model``.

- ``hard``: from where the space starts, which is a vertex too; each step goes to one vertex a group. A trial is
  ``steps`` steps.
- ``soft``: from the base; a trial is one step, towards one expert for each task, with weights that Adam learns.
When to use: a pool of experts of which some are of no use, and labels: measured on digits4, two experts without a task
harmed the plain sum (by .04 in mean accuracy) and not these steps, which ended .13 above it. Coefficients do not leave
the hull of experts and start: there is no extrapolation. Not for a front.
Reference: Chen et al. 2025, FW-Merging, arxiv.org/abs/2503.12649; the factor is that of the official codes (0.1 times
0.3).
Departures: vertices are compared by inner products with task vectors (the official cosine with whole weights sees
little but the base), and a group in which none descends is left alone (the official one is pulled towards zero). The
weights of the soft step are projected to the simplex, as in the paper; its code leaves them free.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from evomerge.proposers.legs import DescentOptions, Legs, with_coefficients
from evomerge.proposers.proposer import Problem
from evomerge.records import BACKWARD_COST, Descent, Floats, Options


class FwMergingOptions(DescentOptions):
    """loss: what descends; batch_size: adapt items a task whose gradient chooses experts.

    steps, factor: of ``hard``. weight_steps, weight_batch_size, learning_rate: of ``soft``, Adam's on the weights.
    """

    variant: Literal["hard", "soft"] = "hard"
    loss: Literal["ce", "entropy"] = "ce"
    steps: int = Field(default=10, ge=1)
    factor: float = Field(default=0.03, gt=0, le=1)
    batch_size: int = Field(default=100, ge=1)
    weight_steps: int = Field(default=500, ge=1)
    weight_batch_size: int = Field(default=16, ge=1)

    @property
    def named_loss(self) -> str:
        """The one that is chosen."""
        return self.loss

    def num_forwards(self, num_adapt: Mapping[str, int], num_trials: int) -> float:
        """A soft step takes a gradient of each task's items, and then many of fewer."""
        if self.variant == "hard":
            return super().num_forwards(num_adapt, num_trials)
        samples = [min(self.batch_size, num) for num in num_adapt.values()]
        learned = self.weight_steps * sum(min(self.weight_batch_size, num) for num in samples)
        return BACKWARD_COST * num_trials * (sum(samples) + learned)


class FwMerging(Legs):
    """Hard or soft steps, trial by trial. Raises: CampaignError if a coefficient's range does not hold 0 and 1."""

    name: ClassVar[str] = "fw_merging"
    options_type: ClassVar[type[Options]] = FwMergingOptions

    def __init__(self, problem: Problem, options: FwMergingOptions) -> None:
        self.options = options
        super().__init__(problem)

    def start(self) -> Floats:
        """The space's start, or the base."""
        base_D = with_coefficients(self.problem, self.name, 0.0, 1.0)
        return self.problem.start if self.options.variant == "hard" else base_D

    def leg(self, seed: tuple[int, ...]) -> Descent:
        """Several hard steps, or one soft one."""
        options = self.options
        if options.variant == "hard":
            return Descent(
                rule="frank_wolfe",
                loss=options.loss,
                steps=options.steps,
                learning_rate=options.factor,
                batch_size=options.batch_size,
                seed=seed,
            )
        return Descent(
            rule="vertex_weights",
            loss=options.loss,
            samples=options.batch_size,
            steps=options.weight_steps,
            learning_rate=options.learning_rate,
            batch_size=options.weight_batch_size,
            seed=seed,
        )
