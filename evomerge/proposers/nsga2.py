"""NSGA-II through optuna: a population, sorted by dominance and crowding.

    x before y if rank(x) < rank(y), or rank(x) = rank(y) and crowding(x) > crowding(y)
    crowding(x) = sum_m (next f_m above x - next f_m below x) / (max f_m - min f_m)

When to use: two or three objectives, no gradients, and a thousand evaluations and more, or scores that no surrogate can
model. For some hundred it is among the slowest: measured on digits4 (four objectives), ``auto`` was farther at 12 than
this at 200.
Reference: Deb et al. 2002, a fast and elitist multiobjective genetic algorithm, IEEE TEC 6(2).
"""

from functools import cache
from typing import Any, ClassVar

from pydantic import Field

from evomerge.proposers.optuna_study import OptunaProposer
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Options


class Nsga2Options(Options):
    """population: size of the population that is carried from generation to generation."""

    population: int = Field(default=20, ge=4)


class Nsga2(OptunaProposer):
    """NSGA-II; results of earlier stages are its first generation."""

    name: ClassVar[str] = "nsga2"
    options_type: ClassVar[type[Options]] = Nsga2Options

    def __init__(self, problem: Problem, options: Nsga2Options) -> None:
        self.options = options
        self.num_startup = options.population
        super().__init__(problem)

    def make_sampler(self, seed: int) -> Any:
        """Optuna's NSGAIISampler, with parents in a stable order."""
        return _stable_nsga2()(seed=seed, population_size=self.options.population)

    def earlier_attributes(self) -> dict[str, Any]:
        """Earlier results count as generation 0."""
        return {_stable_nsga2()._get_generation_key(): 0}

    def recall(self, candidate: Candidate) -> None:
        """Choose the parents of the candidate's generation now, as they were when it was asked."""
        super().recall(candidate)
        sampler = self.make_sampler(0)
        sampler.get_parent_population(self._study, candidate.memo.get(sampler._get_generation_key(), 0))


@cache
def _stable_nsga2() -> Any:
    """Optuna returns a generation's parents in one order when it chooses them and in another from then on."""
    from optuna.samplers import NSGAIISampler

    class StableNsga2(NSGAIISampler):
        def get_parent_population(self, study: Any, generation: int) -> list[Any]:
            return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)

    return StableNsga2
