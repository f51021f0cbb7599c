"""CMA-ES on a weighted mean of the objectives, through pycma.

    x ~ N(m, sigma^2 C)
    m, sigma and C follow the ranking of each generation

Beyond 100 dimensions the covariance is diagonal: its cost grows linearly. Under noise the learning rates can be adapted
instead (``lr_adapt``): the smaller the signal of a generation beside its noise, the smaller the step.
When to use: no gradients, one objective or the mean of several, and some hundred evaluations: it was the best of those
without gradients at that, measured on digits4 (32 dimensions, 240 equivalents). Not for a front: ``surrogate``, without
gradients, was there at 20 where this was at 200; and a generation waits for its slowest worker.
Reference: Hansen 2016, the CMA evolution strategy: a tutorial, arxiv.org/abs/1604.00772; Ros and Hansen 2008, a simple
modification in CMA-ES achieving linear time and space complexity, PPSN X, for the diagonal; Nomura, Akimoto and Ono
2023, arxiv.org/abs/2304.03473, through the cmaes package, for the learning rates.

Shape letters: N candidates of a generation, D dimensions, M objectives.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from evomerge.proposers.generations import Generations
from evomerge.proposers.proposer import Problem, Weights, not_installed, objective_weights
from evomerge.records import Floats, Observation, Options

DIAGONAL_BEYOND = 100


class CmaEsOptions(Options):
    """sigma: first step size in units of the box; population: candidates a generation (default: pycma's).

    separable: a diagonal covariance (default: beyond 100 dimensions); lr_adapt: adapted learning rates, for noisy
    values; weights: of the objectives in the mean (default: equal); penalty: on the mean absolute value of the numbers
    that are searched, in their own units, as Evo-Merging has it (arxiv.org/abs/2509.12951).
    """

    sigma: float = Field(default=0.15, gt=0)
    population: int | None = Field(default=None, ge=4)
    separable: bool | None = None
    lr_adapt: bool = False
    weights: Weights | None = None
    penalty: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _adapts_a_full_covariance(self) -> Self:
        if self.lr_adapt and self.separable:
            raise ValueError("lr_adapt needs a full covariance; leave out separable or lr_adapt")
        return self


class CmaEs(Generations):
    """Covariance matrix adaptation, starting at the best mean of earlier stages, else at the space's start.

    Raises: CampaignError if the weights do not fit the objectives, or lr_adapt lacks its package.
    """

    name: ClassVar[str] = "cma_es"
    options_type: ClassVar[type[Options]] = CmaEsOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: CmaEsOptions) -> None:
        self._penalty = options.penalty
        weights_M = objective_weights(options.weights, problem.num_objectives, self.name)
        start_D = np.clip(problem.best_point, 0.01, 0.99)
        super().__init__(problem, (_LraCmaEs if options.lr_adapt else _PyCma)(start_D, options), weights_M)

    def merit(self, observation: Observation) -> float:
        """The weighted mean less violations, less the penalty."""
        size = np.abs(self.problem.numbers(observation.point)).mean()
        return super().merit(observation) - self._penalty * float(size)


class _PyCma:
    """pycma's, with a generator of ours."""

    def __init__(self, start_D: Floats, options: CmaEsOptions) -> None:
        settings: dict[str, Any] = {
            "bounds": [0.0, 1.0],
            "randn": self._randn,
            "seed": np.nan,  # pycma would seed numpy's global generator
            "verbose": -9,
            "CMA_diagonal": len(start_D) > DIAGONAL_BEYOND if options.separable is None else options.separable,
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolflatfitness": np.inf,
        }
        if options.population is not None:
            settings["popsize"] = options.population
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like matplotlib, for plots that we do not make
            import cma

        self.es = cma.CMAEvolutionStrategy(start_D, options.sigma, settings)

    def ask(self, rng: np.random.Generator) -> list[Floats]:
        """Return a generation."""
        self._rng = rng
        # pycma has returned points outside the bounds that it was given (64 dimensions): clip.
        return [np.clip(point, 0.0, 1.0) for point in self.es.ask()]

    def tell(self, points: Sequence[Floats], losses: Sequence[float]) -> None:
        """Move the distribution by its samples."""
        self.es.tell(points, losses)

    def _randn(self, *shape: int) -> Floats:
        return self._rng.standard_normal(shape)


class _LraCmaEs:
    """CMA-ES with learning-rate adaptation.

    Its steps are small beside its spread: the mean is the result, and so the first candidate of every generation. A
    sample outside the box is scored at the nearest point of the box, and loses by its squared distance from there, in
    standard deviations of the generation; folding the axes at the bounds, as pycma does, drowns the signal.
    """

    def __init__(self, start_D: Floats, options: CmaEsOptions) -> None:
        try:
            from cmaes import CMA
        except ImportError as error:
            raise not_installed("cma_es with lr_adapt", "cmaes", "cmaes", error) from error
        self._es = CMA(start_D, options.sigma, population_size=options.population, lr_adapt=True)
        self._samples_ND = np.empty((0, len(start_D)))

    def ask(self, rng: np.random.Generator) -> list[Floats]:
        """Return the mean, and a generation around it."""
        self._es.reseed_rng(int(rng.integers(2**32)))
        self._samples_ND = np.array([self._es.ask() for _ in range(self._es.population_size)])
        return [np.clip(point_D, 0.0, 1.0) for point_D in (self._es.mean, *self._samples_ND)]

    def tell(self, points: Sequence[Floats], losses: Sequence[float]) -> None:
        """Move the distribution by its samples."""
        losses_N = np.array(losses[1:])
        losses_N = losses_N + losses_N.std() * ((self._samples_ND - np.array(points[1:])) ** 2).sum(axis=1)
        self._es.tell(list(zip(self._samples_ND, losses_N.tolist(), strict=True)))
