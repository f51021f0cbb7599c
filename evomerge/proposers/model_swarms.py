"""Model Swarms: particles that fly between base and experts, drawn to what was best and away from what was worst.

    v <- (r_1 v + r_2 (own best - x) + r_3 (best - x) + r_4 (x - worst)) / sum_i r_i
    x <- x + step v
    r_i = inertia, cognitive, social, repel, each times a draw from [0, 1]

Where the papers move checkpoints this moves their coefficients: the same for an operator that is linear in them, since
a move is a weighted sum of positions.
When to use: one objective or the mean of several, many experts, many workers: no particle waits for another. Not for a
front, nor for few evaluations, as a particle needs several moves; it has not been compared with ``cma_es`` here.
Reference: Feng et al. 2024, Model Swarms, arxiv.org/abs/2410.11163, algorithm 1; the base as a particle follows
PSO-Merging, 2025, arxiv.org/abs/2508.19839.
Departures: a particle moves as soon as its own result is there, with what is known by then; it never leaves the box;
and the search goes on to the end of its budget. The step shrinks with a particle's own moves: as in the paper, once an
iteration (the official code shrinks it once a particle).

Shape letters: D dimensions, M objectives.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.errors import CampaignError
from evomerge.proposers.proposer import Problem, Weights, objective_weights, rank
from evomerge.records import Candidate, Floats, Observation, Options


class ModelSwarmsOptions(Options):
    """between: particles that start between two of base and experts (default: as many as those are).

    inertia, cognitive, social, repel: weights of the four velocities; step: of the first move, multiplied by decay
    after each, down to minimum_step; patience: moves without a better own best after which a particle returns to it,
    at rest; weights: of the objectives in the mean (default: equal).
    """

    between: int | None = Field(default=None, ge=0)
    inertia: float = Field(default=0.4, ge=0)
    cognitive: float = Field(default=0.3, ge=0)
    social: float = Field(default=0.3, gt=0)
    repel: float = Field(default=0.3, ge=0)
    step: float = Field(default=1.0, gt=0)
    decay: float = Field(default=0.95, gt=0, le=1)
    minimum_step: float = Field(default=0.1, ge=0)
    patience: int = Field(default=5, ge=1)
    weights: Weights | None = None


@dataclass(slots=True)
class _Particle:
    position_D: Floats
    velocity_D: Floats
    best_D: Floats
    best_value: float = -np.inf
    num_results: int = 0
    num_idle: int = 0
    """Results since the particle's own best."""


class ModelSwarms:
    """Particle swarm over the experts' coefficients; of earlier stages it knows the best and the worst result.

    Raises: CampaignError if no expert's coefficient is searched, or the weights do not fit the objectives.
    """

    name: ClassVar[str] = "model_swarms"
    options_type: ClassVar[type[Options]] = ModelSwarmsOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: ModelSwarmsOptions) -> None:
        self.problem, self.options = problem, options
        self._weights_M = objective_weights(options.weights, problem.num_objectives, self.name)
        self._ready = deque(_particles(problem, options.between))
        self._flying: dict[int, _Particle] = {}
        self._num_asked = 0
        self._best_D = self._worst_D = problem.start
        self._best_value, self._worst_value = -np.inf, np.inf
        for observation in problem.history:
            self._learn(observation.point, rank(observation, self._weights_M))

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return where the particles that have their result go next; none while all are under way."""
        return [self._issue() for _ in range(min(n, len(self._ready)))]

    def tell(self, observation: Observation) -> None:
        """A particle knows what its position is worth: it is ready to move."""
        particle = self._flying.pop(observation.index)
        value = rank(observation, self._weights_M)
        self._learn(particle.position_D, value)
        particle.num_results += 1
        particle.num_idle += 1
        if value > particle.best_value:
            particle.best_D, particle.best_value, particle.num_idle = particle.position_D, value, 0
        self._ready.append(particle)

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """The particle moves as it did."""
        self._issue()

    def _issue(self) -> Candidate:
        particle = self._ready.popleft()
        if particle.num_results:
            self._move(particle, self.problem.rng(self._num_asked))
        self._flying[self._num_asked] = particle
        self._num_asked += 1
        return Candidate(point=tuple(float(x) for x in particle.position_D))

    def _move(self, particle: _Particle, rng: np.random.Generator) -> None:
        """Algorithm 1, the update of a particle."""
        options = self.options
        if particle.num_idle >= options.patience:
            particle.position_D, particle.num_idle = particle.best_D, 0
            particle.velocity_D = np.zeros_like(particle.velocity_D)
        here_D = particle.position_D
        velocities_4D = np.array(
            [particle.velocity_D, particle.best_D - here_D, self._best_D - here_D, here_D - self._worst_D]
        )
        shares_4 = rng.random(4) * (options.inertia, options.cognitive, options.social, options.repel)
        particle.velocity_D = shares_4 / shares_4.sum() @ velocities_4D
        step = max(options.minimum_step, options.step * options.decay ** (particle.num_results - 1))
        particle.position_D = np.clip(here_D + step * particle.velocity_D, 0.0, 1.0)

    def _learn(self, point_D: Floats, value: float) -> None:
        """A failed candidate is neither best nor worst."""
        if np.isfinite(value) and value > self._best_value:
            self._best_D, self._best_value = point_D, value
        if np.isfinite(value) and value < self._worst_value:
            self._worst_D, self._worst_value = point_D, value


def _particles(problem: Problem, num_between: int | None) -> list[_Particle]:
    """Return base, experts, and particles between two of them, each with a velocity towards another."""
    rng = problem.rng(0)
    corners = _corners(problem)
    pairs = [
        rng.choice(len(corners), 2, replace=False) for _ in range(len(corners) if num_between is None else num_between)
    ]
    starts = corners + [corners[a] + rng.random() * (corners[b] - corners[a]) for a, b in pairs]
    others = [(n + rng.integers(1, len(starts))) % len(starts) for n in range(len(starts))]
    return [
        _Particle(start_D, starts[other] - start_D, best_D=start_D)
        for start_D, other in zip(starts, others, strict=True)
    ]


def _corners(problem: Problem) -> list[Floats]:
    """Return the points of base (all coefficients 0) and experts (one's are 1), as far as the box allows.

    Coordinates that are no coefficient of an expert stay at the start. Raises: CampaignError if all are such.
    """
    experts = problem.searched_experts
    if not experts:
        raise CampaignError(
            "search: model_swarms starts at base and experts, and no expert's coefficient is searched; "
            "search one, or use another proposer"
        )
    return [np.array(problem.mixture(corner)) for corner in ({}, *({expert: 1.0} for expert in experts))]
