"""Nested MAP: MAPs of two models each, from the experts up to one model, for one preference among the objectives.

    model = a * one + b * other, the two whose qualities are nearest
    a, b in [0, 1] by MAP's quadratic

The leaves of the tree are the experts; each objective belongs to the expert that is best at it. Then, until one model
is left: of the two models whose qualities are nearest, mixtures are sampled, quadratics are fitted to the mean of the
objectives of either side, and the mixture that they say is best by preference takes the place of the two. A linear
merge of linear merges is a point of the space itself, so that no model is written to disk and every mixture is a trial
like any other; where an operator is not linear in its coefficients, it is these that are nested. K experts take about
20 (K - 1) evaluations instead of a number that grows with the square of K; then the search ends.
When to use: many experts, one number each, and a preference that is known in advance. Not for a front, and not where
experts only help together: two are judged at a time.
Reference: Li et al. 2024, arxiv.org/abs/2406.07529 (MAP, see ``map.py``), nested merging.
Departures:
- All numbers of an expert move together, whatever the groups; results of earlier stages are not used.
- The fit is MAP's as it is done here. The best mixture is looked for on a grid over the box that was sampled.
- Either model alone is among the sampled mixtures, and was scored before: a pair takes num_startup - 1 evaluations.
- The best mixture is scored, and this is its quality; where that fails, it is paired last, as an expert that fails.
- An expert that is best at nothing answers for all objectives.
- Floors and ceilings count in the last pair: before, the experts that keep them may not be there yet.

Shape letters: N mixtures, K experts, M objectives; 2 are the models of a pair.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.errors import CampaignError
from evomerge.proposers.map import Merits, law_levels
from evomerge.proposers.proposer import Point, Problem, Weights, objective_weights
from evomerge.records import Candidate, Floats, Observation, Options

GRID_N2 = np.stack(np.meshgrid(*2 * [np.linspace(0.0, 1.0, 101)], indexing="ij"), axis=-1).reshape(-1, 2)


class NestedMapOptions(Options):
    """num_startup: mixtures of a pair that are sampled, six at least, as a quadratic has so many unknowns.

    isotropic: share of them that has a = b, half of it with noise; weights: the preference, of the objectives that
    steer (default: equal).
    """

    num_startup: int = Field(default=20, ge=6)
    isotropic: float = Field(default=0.2, ge=0.0, le=1.0)
    weights: Weights | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A node of the tree: the experts' coefficients, the mean of the objectives that it answers for, and their weight.

    mean_M: the weights of that mean, of sum 1. quality: the mean, None where the model could not be scored.
    """

    levels_K: Floats
    answers_M: Floats
    mean_M: Floats
    weight: float
    quality: float | None


class NestedMap:
    """A tree of two-model MAPs. Raises: CampaignError if coefficients of fewer than two experts are searched."""

    name: ClassVar[str] = "nested_map"
    options_type: ClassVar[type[Options]] = NestedMapOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: NestedMapOptions) -> None:
        if len(problem.searched_experts) < 2:
            raise CampaignError(
                "search: nested_map mixes experts two by two: expected searched coefficients of two at least, found "
                f"{len(problem.searched_experts)}; use map"
            )
        self.problem, self.options = problem, options
        given_M = objective_weights(options.weights, problem.num_objectives, self.name)
        self._weights_M = np.full(problem.num_objectives, 1 / problem.num_objectives) if given_M is None else given_M
        self._tree = self._grow()
        self._batch: deque[Point] = deque()
        self._asked: list[Point] = []
        self._told: dict[Point, Observation] = {}

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return what is left of a pair's mixtures; none while results of it are missing, or the tree is grown."""
        candidates: list[Candidate] = []
        while len(candidates) < n and self._has_next():
            candidates.append(Candidate(point=self._batch[0]))
            self.recall(candidates[-1])
        return candidates

    def tell(self, observation: Observation) -> None:
        """Take a result; the last that is missing lets the tree grow."""
        self._told[self._asked[observation.index]] = observation

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """The tree grows as it did: only the position in the batch moves."""
        self._has_next()
        self._asked.append(self._batch.popleft())

    def _has_next(self) -> bool:
        while not self._batch and len(self._told) == len(self._asked):
            batch = next(self._tree, None)
            if batch is None:
                return False
            self._batch.extend(point for point in dict.fromkeys(batch) if point not in self._told)
        return bool(self._batch)

    def _grow(self) -> Iterator[list[Point]]:
        """Yield what is to be scored next; go on when all of it has been told."""
        experts_KK = np.diag(self._alone())
        yield self._points(experts_KK)
        models = self._leaves(experts_KK)
        while len(models) > 1:
            pair = min(combinations(models, 2), key=_apart)
            rest = [model for model in models if model not in pair]
            levels_2K = np.stack([model.levels_K for model in pair])
            mixtures_N2 = law_levels(
                2, self.options.num_startup, self.options.isotropic, self.problem.rng(len(self._asked))
            )
            points = self._points(mixtures_N2 @ levels_2K)
            yield points
            best_2 = self._best(pair, mixtures_N2, [self._told[point] for point in points], is_last=not rest)
            best_K = best_2 @ levels_2K
            yield self._points(best_K[None])
            models = [*rest, self._model(best_K, np.maximum(pair[0].answers_M, pair[1].answers_M))]

    def _alone(self) -> Floats:
        """Return the coefficient (K,) of every expert alone: 1, or as near as the ranges of its numbers allow."""
        ranges: dict[str | None, list[tuple[float, float]]] = {}
        for dimension, owner in zip(self.problem.dimensions, self.problem.owners, strict=True):
            ranges.setdefault(owner, []).append((dimension.low, dimension.high))
        ends = [np.array(ranges[expert]) for expert in self.problem.searched_experts]
        return np.array([np.clip(1.0, of[:, 0].min(), of[:, 1].max()) for of in ends])

    def _leaves(self, experts_KK: Floats) -> list[Model]:
        """Return the experts, each with the objectives that it is best at, or with all if it is best at none."""
        told = [self._told[point] for point in self._points(experts_KK)]
        unknown_M = np.full(self.problem.num_objectives, -np.inf)
        values_KM = np.array([unknown_M if one.values_M is None else one.values_M for one in told])
        owner_M = values_KM.argmax(axis=0)
        answers_KM = (owner_M == np.arange(len(told))[:, None]).astype(np.float64)
        answers_KM[~answers_KM.any(axis=1)] = 1.0
        return [self._model(levels_K, answers_M) for levels_K, answers_M in zip(experts_KK, answers_KM, strict=True)]

    def _model(self, levels_K: Floats, answers_M: Floats) -> Model:
        """Return a model that has been scored."""
        weights_M = self._weights_M * answers_M
        mean_M = weights_M / weights_M.sum() if weights_M.any() else answers_M / answers_M.sum()
        values_M = self._told[self._points(levels_K[None])[0]].values_M
        quality = None if values_M is None else float(mean_M @ values_M)
        return Model(levels_K, answers_M, mean_M, float(weights_M.sum()), quality)

    def _best(
        self, pair: tuple[Model, Model], mixtures_N2: Floats, told: Sequence[Observation], *, is_last: bool
    ) -> Floats:
        """Return the (a, b) of which MAP's quadratics promise most by preference."""
        means_2M = np.stack([model.mean_M for model in pair])
        seen = [
            replace(
                observation,
                point=mixture_2,
                values_M=means_2M @ observation.values_M,
                stderr_M=None if observation.stderr_M is None else np.sqrt(means_2M**2 @ observation.stderr_M**2),
                margins_C=observation.margins_C if is_last else np.zeros(0),
            )
            for mixture_2, observation in zip(mixtures_N2, told, strict=True)
            if observation.values_M is not None
        ]
        if not seen:
            return np.array([1.0, 0.0])
        merits_N2 = Merits(seen)(GRID_N2)
        return np.asarray(GRID_N2[(merits_N2 @ [model.weight for model in pair]).argmax()])

    def _points(self, levels_NK: Floats) -> list[Point]:
        experts = self.problem.searched_experts
        return [self.problem.mixture(dict(zip(experts, levels_K, strict=True))) for levels_K in levels_NK.tolist()]


def _apart(pair: tuple[Model, Model]) -> float:
    """Return how far apart two models' qualities are; what has none is paired last."""
    one, other = pair
    return np.inf if one.quality is None or other.quality is None else abs(one.quality - other.quality)
