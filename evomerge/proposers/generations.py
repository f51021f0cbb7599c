"""Generations: the fold of every search that moves a distribution by whole generations of its samples.

With several workers, ``ask`` returns nothing while results of a generation are missing.

Shape letters: D dimensions, M objectives.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from evomerge.proposers.proposer import Problem, rank
from evomerge.records import Candidate, Floats, Observation


class Distribution(Protocol):
    """A distribution of points in [0, 1]^D that follows what is smaller."""

    def ask(self, rng: np.random.Generator) -> list[Floats]:
        """Return a generation of points (D,), drawn by ``rng``."""

    def tell(self, points: Sequence[Floats], losses: Sequence[float]) -> None:
        """Move by the last generation's losses."""


class Generations:
    """Asks for a distribution's points and tells it their losses; a failed candidate is worse than all others."""

    def __init__(self, problem: Problem, distribution: Distribution, weights_M: Floats | None) -> None:
        self.problem, self.distribution = problem, distribution
        self._weights_M = weights_M
        self._generation, self._first_index, self._num_asked = 0, 0, 0
        self._points = distribution.ask(problem.rng(0))
        self._told: dict[int, float] = {}

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return what is left of the generation, up to ``n``."""
        here = self._num_asked - self._first_index
        points = self._points[here : here + n]
        self._num_asked += len(points)
        return [Candidate(point=tuple(float(x) for x in point)) for point in points]

    def tell(self, observation: Observation) -> None:
        """Take a result; the last of a generation moves the distribution."""
        self._told[observation.index] = self.merit(observation)
        if len(self._told) < len(self._points):
            return
        values = np.array([self._told[self._first_index + i] for i in range(len(self._points))])
        worst = values[np.isfinite(values)].min(initial=0.0)
        losses = -np.where(np.isfinite(values), values, worst - 1.0)
        self.distribution.tell(self._points, losses.tolist())
        self._told.clear()
        self._generation += 1
        self._first_index += len(self._points)
        self._points = self.distribution.ask(self.problem.rng(self._generation))

    def merit(self, observation: Observation) -> float:
        """What is maximized: the (weighted) mean of the objectives, less violations; -inf of a failed candidate."""
        return rank(observation, self._weights_M)

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """The generation is sampled from its index: only the position moves."""
        self._num_asked += 1
