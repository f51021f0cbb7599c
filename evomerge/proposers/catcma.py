"""CatCMA with margin: binary and continuous coordinates together, on a weighted mean of the objectives.

    x_d ~ Bernoulli(q_d) where d is binary, else x ~ N(m, sigma^2 C)

Each binary coordinate's probability q_d moves by natural gradients and stays off 0 and 1 by a margin, so that none is
ever lost; all other coordinates follow CMA-ES.
When to use: the data-flow space, where layers are on or off. Without binary coordinates take ``cma_es``; for a front
take ``nsga2`` or ``surrogate``, which treat on and off as numbers.
Reference: Hamano et al. 2025, arxiv.org/abs/2504.07884, through the cmaes package (extra ``cmaes``).
Departures: a generation's losses count by their rank, in the penalty for samples outside the box too, which so means
the same for all objectives.

Shape letters: N candidates of a generation, D dimensions, B binary ones, C the others, M objectives.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.generations import Generations
from evomerge.proposers.proposer import Problem, Weights, not_installed, objective_weights
from evomerge.records import Floats, Options

NUM_FLIPS = 2  # of binary coordinates of a first candidate, expected: most models far from a good one are bad


class CatCmaOptions(Options):
    """sigma: first step size in units of the box; population: candidates a generation (default: 4 + 3 ln D).

    weights: of the objectives in the mean (default: equal).
    """

    sigma: float = Field(default=0.15, gt=0)
    population: int | None = Field(default=None, ge=4)
    weights: Weights | None = None


class CatCma(Generations):
    """Begins around the best mean of earlier stages, else around the start.

    Raises: CampaignError if the weights do not fit the objectives, or the package is missing.
    """

    name: ClassVar[str] = "catcma"
    options_type: ClassVar[type[Options]] = CatCmaOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: CatCmaOptions) -> None:
        weights_M = objective_weights(options.weights, problem.num_objectives, self.name)
        super().__init__(problem, _CatCmaEs(problem, options), weights_M)


class _CatCmaEs:
    """The package's search; a binary coordinate is a choice of two."""

    def __init__(self, problem: Problem, options: CatCmaOptions) -> None:
        try:
            from cmaes import CatCMAwM
        except ImportError as error:
            raise not_installed("catcma", "cmaes", "cmaes", error) from error
        self._is_binary_D = np.array([dimension.is_binary for dimension in problem.dimensions])
        start_C = problem.best_point[~self._is_binary_D]
        start_B = problem.best_point[self._is_binary_D]
        flipped = min(0.25, NUM_FLIPS / max(1, len(start_B)))
        on_B = np.where(start_B > 0.5, 1 - flipped, flipped)
        continuous = {
            "x_space": [[0.0, 1.0]] * len(start_C),
            "mean": start_C,
            "sigma": options.sigma,
            "cov": np.eye(len(start_C)),
        }
        binary = {"c_space": [2] * len(on_B), "cat_param": np.stack([1 - on_B, on_B], axis=1)}
        self._es: Any = CatCMAwM(
            **(continuous if len(start_C) else {}),
            **(binary if len(on_B) else {}),
            population_size=options.population,
        )
        self._samples: list[Any] = []

    def ask(self, rng: np.random.Generator) -> list[Floats]:
        """Return a generation; samples outside the box at the nearest point of the box."""
        self._es.reseed_rng(int(rng.integers(2**32)))
        self._samples = [self._es.ask() for _ in range(self._es.population_size)]
        points = []
        for sample in self._samples:
            point_D = np.empty(len(self._is_binary_D))
            point_D[~self._is_binary_D] = 0.0 if sample.x is None else sample.x
            point_D[self._is_binary_D] = 0.0 if sample.c is None else sample.c[:, 1]
            points.append(point_D)
        return points

    def tell(self, points: Sequence[Floats], losses: Sequence[float]) -> None:  # noqa: ARG002
        """Move the distribution by its samples."""
        ranks_N = np.argsort(np.argsort(losses, kind="stable"), kind="stable")
        self._es.tell(list(zip(self._samples, ranks_N.tolist(), strict=True)))
