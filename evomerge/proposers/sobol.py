"""Sobol: the start, unless it is scored, then a scrambled low-discrepancy sequence over the whole box.

    x_i = the i-th point of a scrambled Sobol' sequence in [0, 1]^D

It ignores results.
When to use: as a baseline, or to cover a space of few dimensions for a surrogate or a picture. In 32 dimensions it was
the last of those without gradients, by the mean of three seeds (measured on digits4).
Reference: Owen 1998, scrambling Sobol' and Niederreiter-Xing points, Journal of Complexity 14(4).
"""

from collections.abc import Sequence
from typing import ClassVar

from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Observation, Options


class Sobol:
    """Quasi-random search."""

    name: ClassVar[str] = "sobol"
    options_type: ClassVar[type[Options]] = Options
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: Options) -> None:  # noqa: ARG002
        from scipy.stats.qmc import Sobol as Sequence_

        self.problem = problem
        self._sequence = Sequence_(problem.num_dimensions, scramble=True, rng=problem.rng(0))
        self._num_asked = 0

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the next ``n`` points of the sequence."""
        return [Candidate(point=self._next()) for _ in range(n)]

    def tell(self, observation: Observation) -> None:
        """Results do not matter here."""

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """Step over a point that was asked before."""
        self._next()

    def _next(self) -> tuple[float, ...]:
        self._num_asked += 1
        is_start = self._num_asked == 1 and not self.problem.best_is_scored
        point_D = self.problem.start if is_start else self._sequence.random(1)[0]
        return tuple(float(x) for x in point_D)
