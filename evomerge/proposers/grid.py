"""Grid: every combination of evenly spaced numbers, each once. It ignores results, and stops when all have been asked.

    x_d = l / (levels - 1), l = 0 ... levels - 1, in each dimension d

The order follows a scrambled Sobol' sequence from cell to cell, so that any beginning is spread over the box. Nothing
is listed in advance: of a grid that is larger than the budget, the beginning is visited.
When to use: one to three dimensions, to see the whole landscape. Its size is levels^D: 5 levels of 8 numbers are
390,625 models.
Reference: Owen 1998, scrambling Sobol' and Niederreiter-Xing points, Journal of Complexity 14(4), for the order.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Observation, Options


class GridOptions(Options):
    """levels: numbers tried of each coordinate, from its low to its high; the grid has levels^D points."""

    levels: int = Field(default=5, ge=2)


class Grid:
    """Search of a regular grid, for few dimensions."""

    name: ClassVar[str] = "grid"
    options_type: ClassVar[type[Options]] = GridOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: GridOptions) -> None:
        from scipy.stats.qmc import Sobol

        self.num_levels = options.levels
        self.num_points = options.levels**problem.num_dimensions
        self._sequence = Sobol(problem.num_dimensions, scramble=True, rng=problem.rng(0))
        self._asked: set[tuple[int, ...]] = set()

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the next ``n`` points of the grid, as far as there are any left."""
        num_left = self.num_points - len(self._asked)
        return [Candidate(point=self._next()) for _ in range(min(n, num_left))]

    def tell(self, observation: Observation) -> None:
        """Results do not matter here."""

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """Step over a point that was asked before."""
        self._next()

    def _next(self) -> tuple[float, ...]:
        """The grid point of the first cell in the sequence that was not visited: up to 7 draws a point, for all."""
        while True:
            cell = tuple((self._sequence.random(1)[0] * self.num_levels).astype(np.int64).tolist())
            if cell not in self._asked:
                self._asked.add(cell)
                return tuple(level / (self.num_levels - 1) for level in cell)
