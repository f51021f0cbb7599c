"""A Gaussian process through optuna: for evaluations that cost more than the seconds of an ask."""

from typing import Any, ClassVar

from pydantic import Field

from evomerge.proposers.optuna_study import OptunaProposer
from evomerge.proposers.proposer import Problem
from evomerge.records import Options


class GpOptions(Options):
    """num_startup: random candidates before the first model."""

    num_startup: int = Field(default=10, ge=1)


class Gp(OptunaProposer):
    """Gaussian process with expected (hypervolume) improvement. An ask takes seconds: for costly evaluations.

    Reference: Optuna's GPSampler; Daulton et al. 2020, arxiv.org/abs/2006.05078, for several objectives.
    """

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
