"""AdaMerging: gradient steps on the coefficients that lower the entropy of the merged model's predictions.

    c <- Adam step down L(c) = sum_t mean_x H(p_t(. | x; c))
    H(p) = -sum_y p(y) log p(y)

t are the tasks, x adapt items of a batch; after each step c is projected into its range. ``loss: ce`` descends the
cross-entropy of the adapt items' labels instead.
When to use: ``loss: ce`` for one objective or the mean of several, with an operator that has gradients; ``auto`` does
so where there is one objective. Entropy only where there are no labels and classes are many and balanced: it rewards
being confident, not being right. Measured on digits4 it ended below the best single coefficient; labels, and then
``cma_es``, above all others. Not for a front: it finds one model.
Reference: Yang et al. 2024, AdaMerging, arxiv.org/abs/2310.02575, eq. 3; Adam with rate 1e-3 and batches of 16 a task.
Task-wise with ``groups: model``; what the paper calls layer-wise is ``groups: tensor``. AdaMerging++ is the same with
``operator: {name: ties_paper, normalize: false}``, whose density is 0.2 by default.
Departures: it trains on adapt items that are never scored (the paper adapts and evaluates on the same), and
coefficients are projected (the official clamp in the forward has no gradient outside, and coefficients die there).
"""

from typing import ClassVar, Literal

from evomerge.proposers.legs import DescentOptions, Legs
from evomerge.proposers.proposer import Problem
from evomerge.records import Descent, Options


class AdaMergingOptions(DescentOptions):
    """loss: what descends; steps: a trial's; learning_rate: in units of the coefficients; batch_size: items a task."""

    loss: Literal["entropy", "ce"] = "entropy"

    @property
    def named_loss(self) -> str:
        """The one that is chosen."""
        return self.loss


class AdaMerging(Legs):
    """Adam on the coefficients, from where the space starts."""

    name: ClassVar[str] = "adamerging"
    options_type: ClassVar[type[Options]] = AdaMergingOptions

    def __init__(self, problem: Problem, options: AdaMergingOptions) -> None:
        self.options = options
        super().__init__(problem)

    def leg(self, seed: tuple[int, ...]) -> Descent:
        """The rule is Adam as it is."""
        return Descent(
            loss=self.options.loss,
            steps=self.options.steps,
            learning_rate=self.options.learning_rate,
            batch_size=self.options.batch_size,
            seed=seed,
        )
