"""Random: the start, unless it is scored, then points drawn uniformly from the whole box. It ignores results.

    x ~ uniform in [0, 1]^D

When to use: as the baseline that a search has to beat; ``sobol`` is the more even one. Most of a wide box is bad where
many experts add up.
Reference: Bergstra and Bengio 2012, random search for hyper-parameter optimization, JMLR 13.
"""

from collections.abc import Sequence
from typing import ClassVar

from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Observation, Options


class Random:
    """Uniform random search."""

    name: ClassVar[str] = "random"
    options_type: ClassVar[type[Options]] = Options
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: Options) -> None:  # noqa: ARG002
        self.problem = problem
        self._num_asked = 0

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the next ``n`` points."""
        first = self._num_asked
        self._num_asked += n
        return [Candidate(point=self._point(index)) for index in range(first, first + n)]

    def tell(self, observation: Observation) -> None:
        """Results do not matter here."""

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """A point is drawn from its index: only the count moves."""
        self._num_asked += 1

    def _point(self, index: int) -> tuple[float, ...]:
        is_start = index == 0 and not self.problem.best_is_scored
        point_D = self.problem.start if is_start else self.problem.rng(index).random(self.problem.num_dimensions)
        return tuple(float(x) for x in point_D)
