"""CMA-ES on a weighted mean of the objectives, through pycma.

Reference: Hansen 2016, the CMA evolution strategy: a tutorial, arxiv.org/abs/1604.00772. It needs a whole generation
before the next: with several workers, ``ask`` returns nothing while results of a generation are missing.
Beyond 100 dimensions the covariance is diagonal (Ros and Hansen 2008): its cost grows linearly.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.proposer import Problem, rank
from evomerge.records import Candidate, Floats, Observation, Options

DIAGONAL_BEYOND = 100


class CmaEsOptions(Options):
    """sigma: first step size in units of the box; population: candidates a generation (default: pycma's)."""

    sigma: float = Field(default=0.15, gt=0)
    population: int | None = Field(default=None, ge=4)


class CmaEs:
    """Covariance matrix adaptation, starting at the best mean of earlier stages, else at the space's start."""

    name: ClassVar[str] = "cma_es"
    options_type: ClassVar[type[Options]] = CmaEsOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: CmaEsOptions) -> None:
        self.problem = problem
        self._generation, self._first_index = 0, 0
        self._es = self._make(options)
        self._points = self._sample()
        self._num_asked = 0
        self._told: dict[int, float] = {}

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return what is left of the generation, up to ``n``."""
        here = self._num_asked - self._first_index
        points = self._points[here : here + n]
        self._num_asked += len(points)
        return [Candidate(point=tuple(float(x) for x in point)) for point in points]

    def tell(self, observation: Observation) -> None:
        """Take a result; the last of a generation moves the distribution."""
        self._told[observation.index] = rank(observation)
        if len(self._told) < len(self._points):
            return
        values = np.array([self._told[self._first_index + i] for i in range(len(self._points))])
        worst = values[np.isfinite(values)].min(initial=0.0)
        losses = -np.where(np.isfinite(values), values, worst - 1.0)
        self._es.tell(self._points, losses.tolist())
        self._told.clear()
        self._generation += 1
        self._first_index += len(self._points)
        self._points = self._sample()

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """The generation is sampled from its index: only the position moves."""
        self._num_asked += 1

    def _make(self, options: CmaEsOptions) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like matplotlib, for plots that we do not make
            import cma

        settings: dict[str, Any] = {
            "bounds": [0.0, 1.0],
            "randn": self._randn,
            "seed": np.nan,  # pycma would seed numpy's global generator
            "verbose": -9,
            "CMA_diagonal": self.problem.num_dimensions > DIAGONAL_BEYOND,
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolflatfitness": np.inf,
        }
        if options.population is not None:
            settings["popsize"] = options.population
        return cma.CMAEvolutionStrategy(np.clip(self.problem.best_point, 0.01, 0.99), options.sigma, settings)

    def _randn(self, *shape: int) -> Floats:
        return self._rng.standard_normal(shape)

    def _sample(self) -> list[Floats]:
        self._rng = self.problem.rng(self._generation)
        # pycma has returned points outside the bounds that it was given (64 dimensions): clip.
        return [np.clip(point, 0.0, 1.0) for point in self._es.ask()]
