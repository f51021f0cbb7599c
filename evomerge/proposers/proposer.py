"""What a proposer is: ask/tell search over [0, 1]^D, all objectives maximized.

A proposer is a fold over its stage's record: what it asks next depends on the problem, the candidates that it asked
before and the results that it was told since, in their order, and on nothing else (no clock, no global random state;
randomness derives from the seed and the index of the ask; it is the same whether candidates are asked for at once or
one by one). So there is no state to save beside the ledger: a resumed run builds the proposer anew and feeds it the
record, with ``recall`` in place of ``ask``; a replay asks for each candidate again (``evomerge/run/replay.py``).

Shape letters: D dimensions, M objectives.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from evomerge.errors import CampaignError
from evomerge.records import Candidate, Floats, Observation, Options
from evomerge.space.choice import is_coefficient
from evomerge.space.space import Dimension

Point = tuple[float, ...]
"""Coordinates in [0, 1]^D, as a candidate has them."""

Weights = list[Annotated[float, Field(ge=0)]]
"""One number for each objective that steers; only their ratios matter."""

SPREAD = 0.15  # of the startup cloud, in units of the box: CMA-ES begins with the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a search is about.

    dimensions say what each coordinate is, and its range; tasks and experts are those of the campaign, by name;
    reference_M is where hypervolume begins, the worst that base and experts have in each objective; inputs are the
    results of those of them whose recipes the space holds: they are scored before any search, and outside its budget.
    history are the results of earlier stages whose recipes the space holds, in the order in which they came. best is
    the best of all their results, at the point nearest to its recipe, which the space need not hold.
    """

    dimensions: tuple[Dimension, ...]
    num_objectives: int
    seed: tuple[int, ...]
    tasks: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    reference_M: Floats | None = None
    inputs: tuple[Observation, ...] = ()
    history: tuple[Observation, ...] = ()
    best: Observation | None = None

    @property
    def num_dimensions(self) -> int:
        """Length of a point."""
        return len(self.dimensions)

    @property
    def start(self) -> Floats:
        """Where the stage starts, (D,): nearest to the best recipe of those before, else where the space starts."""
        if self.best is not None:
            return self.best.point
        return np.array([dimension.start_coordinate for dimension in self.dimensions])

    @property
    def best_point(self) -> Floats:
        """Where a search begins: the best mean of the earlier results, else the space's start."""
        known = self.history if self.best is None else (self.best, *self.history)
        best = max(known, key=rank, default=None)
        return self.start if best is None else best.point

    @property
    def best_is_scored(self) -> bool:
        """Whether the best point's own recipe has been scored: there is no need to ask for it again."""
        best_D = self.best_point
        return any(np.array_equal(observation.point, best_D) for observation in self.history)

    @property
    def owners(self) -> list[str | None]:
        """Whose coefficient each coordinate is; None for what is no coefficient of an expert."""
        return [dimension.expert if is_coefficient(dimension.parameter) else None for dimension in self.dimensions]

    @property
    def searched_experts(self) -> list[str]:
        """The experts of whom coefficients are searched."""
        return list(dict.fromkeys(owner for owner in self.owners if owner is not None))

    def mixture(self, coefficients: Mapping[str, float]) -> Point:
        """Return the point at which all numbers of an expert are its coefficient (default 0), as far as the box allows.

        What is no coefficient of an expert stays at the start.
        """
        levels = [None if owner is None else coefficients.get(owner, 0.0) for owner in self.owners]
        return tuple(
            d.start_coordinate if level is None else float(np.clip((level - d.low) / (d.high - d.low), 0.0, 1.0))
            for d, level in zip(self.dimensions, levels, strict=True)
        )

    def numbers(self, point_D: Floats) -> Floats:
        """Return what a point's coordinates stand for, each in its own units."""
        low_D = np.array([dimension.low for dimension in self.dimensions])
        high_D = np.array([dimension.high for dimension in self.dimensions])
        numbers_D: Floats = low_D + point_D * (high_D - low_D)
        return numbers_D

    def startup_point(self, index: int) -> Point:
        """Return the ``index``-th candidate before there is anything to learn from: the best point, then a cloud.

        Uniform in the whole box would be far worse: with several experts at once, most of the box drowns them all.
        """
        center_D = self.best_point
        spread = SPREAD if index > 0 or self.best_is_scored else 0.0
        cloud_D = center_D + spread * self.rng(index).standard_normal(len(center_D))
        return tuple(float(x) for x in np.clip(cloud_D, 0.0, 1.0))

    def rng(self, index: int) -> np.random.Generator:
        """Return the generator of the ``index``-th ask (or generation)."""
        return np.random.default_rng([*self.seed, index])


class Proposer(Protocol):
    """One search algorithm."""

    name: ClassVar[str]
    options_type: ClassVar[type[Options]]
    needs_gradients: ClassVar[bool]

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:
        """Return up to ``n`` candidates; fewer, or none, where it must wait for a pending result."""

    def tell(self, observation: Observation) -> None:
        """Take one result; they come one by one and in any order."""

    def recall(self, candidate: Candidate) -> None:
        """Take back a candidate that was asked before the run was interrupted, in the order of asking."""


@contextmanager
def proposing() -> Iterator[None]:
    """Hold linear algebra to one thread while a proposer is made, asked or told.

    Its matrices are small: a second thread waits for a core that a worker has, and takes forty times as long.
    """
    with _linear_algebra().limit(limits=1):
        yield


@cache
def _linear_algebra() -> Any:
    import scipy.linalg  # noqa: F401  (what is not loaded yet would not be held)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def rank(observation: Observation, weights_M: Floats | None = None) -> float:
    """The (weighted) mean of the objectives, less what floors and ceilings are missed by; a failed one ranks last."""
    values_M = observation.values_M
    if values_M is None:
        return -np.inf
    mean = values_M.mean() if weights_M is None else values_M @ weights_M
    return float(mean) - observation.violation


def not_installed(who: str, package: str, extra: str, error: ImportError) -> CampaignError:
    """Return what is to be raised where an optional package of a proposer is missing."""
    return CampaignError(
        f"search: {who} needs the {package} package, and {error.name} is not installed; pip install 'evomerge[{extra}]'"
    )


def objective_weights(weights: Sequence[float] | None, num_objectives: int, proposer: str) -> Floats | None:
    """Return weights (M,) that sum to 1; None for equal ones. Raises: CampaignError if they do not fit."""
    if weights is None:
        return None
    if len(weights) != num_objectives or not sum(weights):
        raise CampaignError(
            f"search: {proposer}.weights: expected one number for each objective that steers ({num_objectives}), "
            f"not all of them 0, found {list(weights)}"
        )
    return np.array(weights) / sum(weights)
