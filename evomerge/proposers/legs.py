"""One descent, cut into trials: what the proposers share that follow a gradient from trial to trial."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.descent_rules import hulls
from evomerge.errors import CampaignError
from evomerge.proposers.proposer import Problem
from evomerge.records import BACKWARD_COST, Arrival, Candidate, Descent, Floats, Observation, Options


class DescentOptions(Options):
    """steps: a trial's; learning_rate: in units of what is moved; batch_size: adapt items a task and step."""

    steps: int = Field(default=50, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1)

    @property
    def named_loss(self) -> str:
        """The loss that an evaluator must have."""
        return "ce"

    def num_forwards(self, num_adapt: Mapping[str, int], num_trials: int) -> float:
        """Return what a stage's descents cost, in forwards of an item, by the tasks' numbers of adapt items."""
        return BACKWARD_COST * num_trials * self.steps * sum(min(self.batch_size, num) for num in num_adapt.values())


class Legs(ABC):
    """Each trial continues the descent of the one before and scores where it ends; it waits for the one under way.

    Raises: CampaignError if the method cannot descend in this space.
    """

    needs_gradients: ClassVar[bool] = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._arrival = Arrival(point=tuple(self.start().tolist()), losses=())
        self._num_asked, self._num_steps = 0, 0
        self._waiting = False

    def start(self) -> Floats:
        """Return the point (D,) where the descent begins."""
        return self.problem.start

    @abstractmethod
    def leg(self, seed: tuple[int, ...]) -> Descent:
        """Return the first leg; later ones take up what the one before has left."""

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the next leg of the descent, or nothing while one is under way."""
        if self._waiting or n < 1:
            return []
        descent = replace(
            self.leg((*self.problem.seed, self._num_asked)),
            steps_before=self._num_steps,
            first_moment=self._arrival.first_moment,
            second_moment=self._arrival.second_moment,
            raw=self._arrival.raw,
        )
        candidate = Candidate(point=self._arrival.point, descent=descent)
        self.recall(candidate)
        return [candidate]

    def tell(self, observation: Observation) -> None:
        """Go on from where the descent ended; a failed leg is tried again with other batches."""
        self._waiting = False
        if observation.arrival is not None:
            self._arrival = observation.arrival
            self._num_steps += len(observation.arrival.losses)

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """A leg is under way."""
        self._num_asked += 1
        self._waiting = True


def with_coefficients(problem: Problem, who: str, number: float, *others: float) -> Floats:
    """Return the space's start (D,) with all coefficients at ``number``.

    Raises: CampaignError if no coefficient is searched, or the range of one does not hold ``number`` and the others.
    """
    point_D, coefficients = problem.start, hulls(problem.dimensions)
    if not coefficients:
        raise CampaignError(f"search: {who} moves the experts' coefficients, and none is searched; give them a range")
    for d in np.concatenate(coefficients):
        dimension = problem.dimensions[d]
        for needed in (number, *others):
            if not dimension.low <= needed <= dimension.high:
                raise CampaignError(
                    f"search: {who} needs a range that holds {needed:g}; {dimension.name} is searched from "
                    f"{dimension.low:g} to {dimension.high:g}: widen it"
                )
        point_D[d] = (number - dimension.low) / (dimension.high - dimension.low)
    return point_D
