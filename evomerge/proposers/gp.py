"""A Gaussian process through optuna: for evaluations that cost more than the seconds of an ask.

    x = argmax E[max(HV(front and f(x)) - HV(front), 0)]
    f_m ~ GP of objective m; EI for one objective

When to use: to compare with optuna's own, where an evaluation takes minutes and there are at most some 20 dimensions.
Otherwise ``surrogate`` is the same idea, proposes in a fraction of a second, and uses standard errors and gradients.
Reference: Optuna's GPSampler; Daulton et al. 2020, arxiv.org/abs/2006.05078, for several objectives.
"""

from typing import Any, ClassVar

from pydantic import Field

from evomerge.proposers.optuna_study import OptunaProposer
from evomerge.proposers.proposer import Problem
from evomerge.records import Options


class GpOptions(Options):
    """num_startup: random candidates before the first model."""

    num_startup: int = Field(default=10, ge=1)


class Gp(OptunaProposer):
    """Gaussian process with expected (hypervolume) improvement."""

    name: ClassVar[str] = "gp"
    options_type: ClassVar[type[Options]] = GpOptions

    def __init__(self, problem: Problem, options: GpOptions) -> None:
        self.options = options
        self.num_startup = options.num_startup
        super().__init__(problem)

    def make_sampler(self, seed: int) -> Any:
        """Optuna's GPSampler."""
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed, n_startup_trials=self.options.num_startup)
