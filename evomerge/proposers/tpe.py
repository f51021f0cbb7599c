"""TPE through optuna: densities of good and bad candidates, and where their ratio is best."""

from typing import Any, ClassVar

from pydantic import Field

from evomerge.proposers.optuna_study import OptunaProposer
from evomerge.proposers.proposer import Problem
from evomerge.records import Options


class TpeOptions(Options):
    """num_startup: random candidates before the first model."""

    num_startup: int = Field(default=10, ge=1)


class Tpe(OptunaProposer):
    """Tree-structured Parzen estimator, one or several objectives.

    Reference: Ozaki et al. 2022, multiobjective tree-structured Parzen estimator, JAIR 73.
    """

    name: ClassVar[str] = "tpe"
    options_type: ClassVar[type[Options]] = TpeOptions

    def __init__(self, problem: Problem, options: TpeOptions) -> None:
        self.options = options
        self.num_startup = options.num_startup
        super().__init__(problem)

    def make_sampler(self, seed: int) -> Any:
        """Optuna's TPESampler."""
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed, n_startup_trials=self.options.num_startup)
