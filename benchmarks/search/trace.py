"""One searcher on one problem with one seed: the loop, and the record of what it did.

The loop is the driver's with one worker, and stops when the cost reaches the budget. A candidate is scored on the test
items only if it is on the front of the search values when it is found: what is dominated once stays dominated, and can
never be chosen. Those scores are told to nobody and cost nothing.

Shape letters: N trials, M objectives.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.search.problem import Opened, Scores
from evomerge.campaign.course import Course
from evomerge.campaign.stages import Stage
from evomerge.errors import CandidateError
from evomerge.front.front import maximized, observe
from evomerge.front.pareto import non_dominated
from evomerge.proposers.proposer import proposing
from evomerge.records import Candidate, Floats, Measurement, Trial

FAILED_COST = 1.0  # of a candidate that could not be scored
TOLERANCE = 1e-9  # of sums of costs


@dataclass(frozen=True, slots=True)
class Step:
    """One trial: what it cost, its maximized values, and how many seconds it took to propose and to score.

    search is None if the trial failed; test is None too if it was not on the front when it was found.
    """

    stage: int
    cost: float
    search: Sequence[float] | None
    test: Sequence[float] | None
    propose_s: float
    score_s: float


@dataclass(frozen=True)
class Trace:
    """All trials of one run in their order, and the maximized test values of base and experts."""

    steps: Sequence[Step]
    references: Mapping[str, Sequence[float]]

    @cached_property
    def costs(self) -> Floats:
        """Cost so far at the end of each trial, (N,), in full-evaluation equivalents."""
        return np.cumsum([step.cost for step in self.steps])

    def scored(self, cost: float) -> list[int]:
        """Return the trials that have scores once that much is spent."""
        return [n for n, step in enumerate(self.steps) if step.search and self.costs[n] <= cost + TOLERANCE]

    def front(self, cost: float) -> list[int]:
        """Return the trials that are on the front of the search values once that much is spent."""
        scored = self.scored(cost)
        return [scored[place] for place in np.flatnonzero(non_dominated(self.searched(scored)))] if scored else []

    def searched(self, trials: Sequence[int]) -> Floats:
        """Search values (N, M) of some trials."""
        return np.array([self.steps[n].search for n in trials], dtype=np.float64)

    def tested(self, trials: Sequence[int]) -> Floats:
        """Test values (N, M) of trials that were on the front."""
        return np.array([self.steps[n].test for n in trials], dtype=np.float64)


def run(opened: Opened, stages: Sequence[Stage], seed: int, budget: float, tick: Callable[[float], None]) -> Trace:
    """Search until the cost reaches the budget, or no stage has anything left to ask; tick is told the cost so far."""
    steps, cost = [], 0.0
    for step in _steps(opened, stages, seed):
        steps.append(step)
        cost += step.cost
        tick(cost)
        if cost >= budget - TOLERANCE:
            break
    return Trace(steps, {name: values_M.tolist() for name, values_M in opened.references.items()})


def _steps(opened: Opened, stages: Sequence[Stage], seed: int) -> Iterator[Step]:
    objectives, trials = opened.plan.objectives, list[Trial]()
    front_NM = np.zeros((0, len(opened.plan.steering)))
    course = Course(opened.campaign, opened.plan, [stage.changes for stage in stages])
    for number, stage in enumerate(stages):
        started = time.perf_counter()
        leg = course.leg(number, trials)
        opened.scorer.configure(leg.plan.stage_space)
        with proposing():
            proposer = stage.make_proposer(leg.problem((seed, number), opened.searched))
        for index in range(stage.num_evaluations):
            with proposing():
                asked = proposer.ask(1, [])
            if not asked:
                break
            proposed = time.perf_counter()
            measurement = _measure(opened.scorer, asked[0])
            scored = time.perf_counter()
            place = len(trials)
            trial = Trial(
                number=place, stage=number, index=index, candidate=asked[0], known=place, order=place,
                measurement=measurement,
            )  # fmt: skip
            trials.append(trial)
            with proposing():
                proposer.tell(observe(trial, objectives))
            told = time.perf_counter()
            values_M, test_M = None, None
            if measurement:
                values_M = maximized(measurement, objectives)
                candidates_NM = np.vstack([front_NM, values_M])
                members = non_dominated(candidates_NM)
                front_NM = candidates_NM[members]
                if members[-1]:
                    test_M = maximized(opened.scorer.score(Candidate(point=trial.point), "test"), objectives)
            yield Step(
                stage=number,
                cost=measurement.cost if measurement else FAILED_COST,
                search=None if values_M is None else values_M.tolist(),
                test=None if test_M is None else test_M.tolist(),
                propose_s=proposed - started + told - scored,
                score_s=scored - proposed,
            )
            started = time.perf_counter()


def _measure(scorer: Scores, candidate: Candidate) -> Measurement | None:
    try:
        return scorer.score(candidate, "search")
    except CandidateError:
        return None
