"""What surrogates know of unseen candidates after few evaluations, with and without the gradients of a descent.

    make bench-surrogates

For each seed (which also splits the items anew) a gradient front's descent is run. Candidates are models of random
preferences between its anchors, every second one moved at random in all dimensions. Each surrogate is told the first 3,
5, 10 or 20 of them and orders 60 others; the rank correlation (Spearman) with what these score on the search items is
the mean over objectives and seeds. The descent costs what the table's title says, in full-evaluation equivalents.

Shape letters: N candidates, D dimensions, M objectives.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.search.families import FamilyProblem
from evomerge.front.front import observe
from evomerge.proposers.gradient_front import GradientFront, GradientFrontOptions
from evomerge.proposers.map import Merits
from evomerge.proposers.proposer import Problem
from evomerge.proposers.surrogate import slopes_of
from evomerge.records import Candidate, Floats, Observation, Trial
from evomerge.surrogates.objective import Told, model_objective
from evomerge.surrogates.slopes import SlopeProcess

FAMILIES = ("digits4", "text")
NUM_SEEDS = 5
NUM_TOLD = (0, 3, 5, 10, 20)
NUM_UNSEEN = 60
MOVED = 0.1  # in units of the box


@dataclass(frozen=True)
class World:
    """One seed's descent and scored candidates: those to be told, in their order, then the unseen ones."""

    cost: float
    slopes: list[SlopeProcess | None]
    told: list[Observation]
    points_ND: Floats
    values_NM: Floats


def main() -> None:
    """Print a table for every family."""
    console = Console(highlight=False)
    for family in sys.argv[1:] or FAMILIES:
        worlds = [make_world(family, seed) for seed in range(NUM_SEEDS)]
        cost = np.mean([world.cost for world in worlds])
        table = Table(
            title=f"{family}, {worlds[0].points_ND.shape[1]} dimensions: rank correlation on unseen candidates, mean "
            f"of {NUM_SEEDS} seeds; the descent costs {cost:.1f}",
            box=SIMPLE_HEAD,
        )
        for column in ("surrogate", *(f"told {n}" for n in NUM_TOLD)):
            table.add_column(column)
        for name, order in ORDERS.items():
            table.add_row(name, *(_mean([correlation(world, order, n) for world in worlds]) for n in NUM_TOLD))
        console.print(table)


def make_world(family: str, seed: int) -> World:
    """Descend, and score the candidates on the search items."""
    opened = FamilyProblem(family).open(seed)
    objectives = opened.plan.objectives

    def score(candidate: Candidate) -> tuple[Observation, float]:
        measurement = opened.scorer.score(candidate, "search")
        trial = Trial(number=0, stage=0, index=0, candidate=candidate, known=0, order=0, measurement=measurement)
        return observe(trial, objectives), measurement.cost

    problem = Problem(dimensions=opened.plan.space.dimensions, num_objectives=len(opened.plan.steering), seed=(seed, 0))
    (start,) = GradientFront(problem, GradientFrontOptions()).ask(1, [])
    descent, cost = score(start)
    assert descent.arrival is not None
    anchors_MD = np.reshape(descent.arrival.anchors, (problem.num_objectives, -1))
    seen = [score(candidate)[0] for candidate in _candidates(anchors_MD, np.random.default_rng([seed, 1]))]
    unseen = seen[max(NUM_TOLD) :]
    return World(
        cost=cost - 1,
        slopes=slopes_of([descent], problem),
        told=seen[: max(NUM_TOLD)],
        points_ND=np.array([one.point for one in unseen]),
        values_NM=np.array([one.values_M for one in unseen]),
    )


def _candidates(anchors_MD: Floats, rng: np.random.Generator) -> Iterator[Candidate]:
    for number in range(max(NUM_TOLD) + NUM_UNSEEN):
        point_D = rng.dirichlet(np.ones(len(anchors_MD))) @ anchors_MD
        moved_D = point_D + (number % 2) * MOVED * rng.standard_normal(len(point_D))
        yield Candidate(point=tuple(np.clip(moved_D, 0.0, 1.0).tolist()))


Order = Callable[[World, list[Observation]], Floats | None]
"""Predicted values (N, M) of a world's unseen candidates, up to a rising line; None where nothing is known."""


def correlation(world: World, order: Order, num_told: int) -> float:
    """Return the mean over objectives of the rank correlation with what the unseen candidates score."""
    predicted_NM = order(world, world.told[:num_told])
    if predicted_NM is None:
        return np.nan
    pairs = zip(predicted_NM.T, world.values_NM.T, strict=True)
    return float(np.mean([spearmanr(predicted_N, values_N).statistic for predicted_N, values_N in pairs]))


def _surrogates(*, has_companion: bool, has_slopes: bool) -> Order:
    def order(world: World, told: list[Observation]) -> Floats | None:
        if not told:
            ways = [way for way in world.slopes if way and has_slopes]
            return np.stack([-way.predict(world.points_ND) for way in ways], axis=1) if ways else None
        points_ND = np.array([one.point for one in told])
        values_NM, stderr_NM, losses_NM = (
            np.array([getattr(one, what) for one in told]) for what in ("values_M", "stderr_M", "losses_M")
        )
        models = [
            model_objective(
                Told(
                    points_ND,
                    values_NM[:, m],
                    (0.5 * stderr_NM[:, m]) ** 2,
                    losses_NM[:, m] if has_companion else None,
                    world.slopes[m] if has_slopes else None,
                )
            )
            for m in range(values_NM.shape[1])
        ]
        return np.stack([model.mean(world.points_ND) for model in models], axis=1)

    return order


def _quadratic(world: World, told: list[Observation]) -> Floats | None:
    return Merits(told)(world.points_ND) if told else None


ORDERS: dict[str, Order] = {
    "ours: companion, and slopes of the descent": _surrogates(has_companion=True, has_slopes=True),
    "ours without the slopes": _surrogates(has_companion=True, has_slopes=False),
    "a process of the metric alone": _surrogates(has_companion=False, has_slopes=False),
    "MAP's quadratic (ours: ridge chosen by left-out values)": _quadratic,
}


def _mean(correlations: list[float]) -> str:
    return "" if np.isnan(correlations).any() else f"{np.mean(correlations):.2f}"


if __name__ == "__main__":
    main()
