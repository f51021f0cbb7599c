"""NSGA-III through optuna: a population, sorted by dominance and spread over reference directions.

    distance(x, w) = |f(x) - (w' f(x) / w' w) w|

f is scaled to the front's range; of a rank that does not fit whole, candidates near directions that have few come
first. There are as many reference directions w as the population can fill, evenly spread (section IV-B and table I).
When to use: four objectives and more, where nearly all candidates are non-dominated and crowding says little, and a
thousand evaluations and more. For fewer take ``auto``; for two or three objectives ``nsga2``.
Reference: Deb and Jain 2014, an evolutionary many-objective optimization algorithm using reference-point-based
nondominated sorting approach, part I, IEEE TEC 18(4).
"""

import copy
import warnings
from functools import cache
from math import comb
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.optuna_study import OptunaProposer
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Options


class Nsga3Options(Options):
    """population: size of the population that is carried from generation to generation."""

    population: int = Field(default=20, ge=4)


class Nsga3(OptunaProposer):
    """NSGA-III; results of earlier stages are its first generation."""

    name: ClassVar[str] = "nsga3"
    options_type: ClassVar[type[Options]] = Nsga3Options

    def __init__(self, problem: Problem, options: Nsga3Options) -> None:
        self.options = options
        self.num_startup = options.population
        super().__init__(problem)

    def make_sampler(self, seed: int) -> Any:
        """Optuna's NSGAIIISampler, with parents in a stable order, chosen by the number of their generation."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is experimental
            return _stable_nsga3()(
                seed=seed,
                population_size=self.options.population,
                dividing_parameter=num_divisions(self.problem.num_objectives, self.options.population),
            )

    def earlier_attributes(self) -> dict[str, Any]:
        """Earlier results count as generation 0."""
        return {_stable_nsga3()._get_generation_key(): 0}

    def recall(self, candidate: Candidate) -> None:
        """Choose the parents of the candidate's generation now, as they were when it was asked."""
        super().recall(candidate)
        seed = int(np.random.SeedSequence([*self.problem.seed, self._num_asked - 1]).generate_state(1)[0])
        sampler = self.make_sampler(seed)
        sampler.get_parent_population(self._study, candidate.memo.get(sampler._get_generation_key(), 0))


def num_divisions(num_objectives: int, population: int) -> int:
    """Return into how many steps each axis is cut: the most that give no more directions than the population has."""
    divisions = 1
    while num_objectives > 1 and comb(num_objectives + divisions, divisions + 1) <= population:
        divisions += 1
    return divisions


@cache
def _stable_nsga3() -> Any:
    """Optuna's sampler with two departures.

    It returns a generation's parents in one order when it chooses them and in another from then on. And its choice
    among non-dominated trials measures from the smallest values as the ideal, whatever the study's directions
    (5.0.0): it is handed losses.
    """
    from optuna.samplers import NSGAIIISampler
    from optuna.study import StudyDirection

    class StableNsga3(NSGAIIISampler):
        def get_parent_population(self, study: Any, generation: int) -> list[Any]:
            return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)

        def select_parent(self, study: Any, generation: int) -> list[Any]:
            trials = self.get_population(study, generation - 1) + self.get_parent_population(study, generation - 1)
            losses = [copy.copy(trial) for trial in trials]
            for trial in losses:
                trial.values = [-value for value in trial.values]
            minimizing: Any = SimpleNamespace(directions=[StudyDirection.MINIMIZE] * len(study.directions))
            chosen = {trial.number for trial in self._elite_population_selection_strategy(minimizing, losses)}
            return [trial for trial in trials if trial.number in chosen]

    return StableNsga3
