"""Analytic problems with known fronts: distances to as many centres as there are objectives, seen through a link.

Each objective is a decreasing function of a quadratic ``q_m(x) = (x - c_m)' H_m (x - c_m)`` with H_m positive definite.
The quadratics are convex, so that their Pareto set is what minimizes weighted sums of them,
``x(w) = (sum_m w_m H_m)^-1 sum_m w_m H_m c_m`` over the weights of the simplex; and a Pareto set stays what it is under
a monotone link of each objective. The links give the fronts their shapes (for two objectives with one Hessian,
``sqrt(q_1) + sqrt(q_2) = 1`` on the front):

- ``quadratic``, 1 - q: bulges outward, weighted sums find all of it;
- ``linear``, 1 - sqrt(q): with two objectives a straight line, on which all weighted sums of equal weights are equal;
- ``bell``, exp(-5 q): sags inward, weighted sums find its ends alone (Fonseca and Fleming 1995, with another width).

The dimensions look like those of a merge: experts times layers, one expert good at each objective, the start at 0.3.
There are no gradients and no losses. Test values are the true ones.

Shape letters: D dimensions, M objectives, F points of a front, W weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np

from benchmarks.search.problem import Opened
from benchmarks.search.searchers import Section
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Plan, StageSpace
from evomerge.campaign.references import input_recipes
from evomerge.campaign.sections import BudgetSection, ObjectiveSection
from evomerge.front.front import maximized
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.residence import Place
from evomerge.operators.linear import TaskArithmetic
from evomerge.records import Candidate, Floats, Measurement, Objective, Recipe, Score, Split, TensorInfo
from evomerge.space.choice import COEFFICIENT, Choice
from evomerge.space.groups import Groups
from evomerge.space.regroup import by_tensor
from evomerge.space.space import Range, Searched, Space

START = 0.3
BELL = 5.0
NUM_FRONT = 300
NUM_WEIGHTS = 4000


@dataclass(frozen=True)
class Analytic:
    """One problem: num_experts times num_layers dimensions, and one objective for each of the first experts.

    condition: ratio of the largest to the smallest eigenvalue of the matrices that each H_m is mixed from. twist: in
    [0, 1], how much of each H_m is its own; with 0 they share one but for its scale, and the Pareto set is the hull of
    the centres.
    noise: standard error of search values.
    """

    name: str
    num_objectives: int
    num_experts: int
    num_layers: int
    link: Literal["quadratic", "linear", "bell"]
    condition: float = 10.0
    twist: float = 0.0
    noise: float = 0.0

    @property
    def num_dimensions(self) -> int:
        """D."""
        return self.num_experts * self.num_layers

    @property
    def identity(self) -> Mapping[str, Any]:
        """Its numbers; the version stands for the formulas of this file."""
        return {"version": 1, **asdict(self)}

    @cached_property
    def centers(self) -> Floats:
        """Where each objective is best, (M, D): its own expert's coefficients are large there, the others' small."""
        rng = np.random.default_rng([self.num_dimensions, 1])
        own_MK = np.eye(self.num_experts)[: self.num_objectives]
        center_MK1 = (0.15 + 0.6 * own_MK)[:, :, None]
        jitter_MKL = rng.uniform(-0.1, 0.1, (self.num_objectives, self.num_experts, self.num_layers))
        return (center_MK1 + jitter_MKL).reshape(self.num_objectives, -1)

    @cached_property
    def hessians(self) -> Floats:
        """H_m, (M, D, D), scaled so that the mean of q_m over the other objectives' centres is 1."""
        num_objectives, num_dimensions = self.num_objectives, self.num_dimensions
        rng = np.random.default_rng([num_dimensions, 2])
        shared_DD, *own = (_random_hessian(rng, num_dimensions, self.condition) for _ in range(num_objectives + 1))
        hessians_MDD = np.array([(1 - self.twist) * shared_DD + self.twist * own_DD for own_DD in own])
        between_MMD = self.centers[None] - self.centers[:, None]
        squares_MM = np.einsum("mnd,mde,mne->mn", between_MMD, hessians_MDD, between_MMD)
        scale_M: Floats = squares_MM.sum(axis=1) / (num_objectives - 1)
        hessians_MDD /= scale_M[:, None, None]
        return hessians_MDD

    def values(self, point_D: Floats) -> Floats:
        """Return the true values (..., M), at most 1, of points (..., D)."""
        away_MD = point_D[..., None, :] - self.centers
        squares_M: Floats = np.einsum("...md,mde,...me->...m", away_MD, self.hessians, away_MD)
        match self.link:
            case "quadratic":
                values_M: Floats = 1 - squares_M
            case "linear":
                values_M = 1 - np.sqrt(np.maximum(0, squares_M))
            case "bell":
                values_M = np.exp(-BELL * squares_M)
        return values_M

    def pareto_points(self, weights_WM: Floats) -> Floats:
        """Return the points (W, D) that minimize the weighted sums of the quadratics."""
        hessians_WDD = np.einsum("wm,mde->wde", weights_WM, self.hessians)
        pulls_WD = np.einsum("wm,mde,me->wd", weights_WM, self.hessians, self.centers)
        return np.asarray(np.linalg.solve(hessians_WDD, pulls_WD[..., None])[..., 0])

    @cached_property
    def front(self) -> Floats:
        """Points (F, M) of the true front, spread evenly: each next one is the farthest from those before."""
        weights_WM = np.random.default_rng(0).dirichlet(np.full(self.num_objectives, 0.7), NUM_WEIGHTS)
        weights_WM[: self.num_objectives] = np.eye(self.num_objectives)
        values_WM = self.values(self.pareto_points(weights_WM))
        kept, distance_W = [0], np.full(NUM_WEIGHTS, np.inf)
        while len(kept) < NUM_FRONT:
            distance_W = np.minimum(distance_W, np.linalg.norm(values_WM - values_WM[kept[-1]], axis=1))
            kept.append(int(distance_W.argmax()))
        return values_WM[kept]

    def campaign(self, search: Section, evaluations: int, seed: int) -> Campaign:
        """A campaign with this search; what it says of models and data is read by nobody."""
        names = [f"expert{k}" for k in range(self.num_experts)]
        return Campaign(
            name=self.name,
            base="base",
            experts={name: name for name in names},
            objectives=[
                ObjectiveSection(name=name, task=name, metric="value", direction="max")
                for name in names[: self.num_objectives]
            ],
            evaluation={"kind": "analytic", "split": {"adapt": 0.0, "search": 0.5, "test": 0.5}},
            search=search,
            budget=BudgetSection(evaluations=evaluations),
            seed=seed,
        )

    def plan(self, seed: int) -> Plan:  # noqa: ARG002  (nothing is split)
        """A plan with a real space, and nothing to merge."""
        groups: Groups = {f"layer{layer}": (f"layer{layer}",) for layer in range(self.num_layers)}
        depths = {name: layer / max(1, self.num_layers - 1) for layer, name in enumerate(groups)}
        operator = TaskArithmetic()
        experts = [f"expert{k}" for k in range(self.num_experts)]
        spec = next(spec for spec in operator.parameters if spec.name == COEFFICIENT)
        searched = Searched(spec=spec, setting=Range(low=0.0, high=1.0, start=START))
        return Plan(
            base=cast(Checkpoint, SimpleNamespace(folder="")),
            experts={name: cast(Checkpoint, SimpleNamespace(folder=name)) for name in experts},
            tensors=tuple(TensorInfo(name, (1,)) for name in groups),
            dtype="float32",
            place=Place(device="cpu", residence="resident"),
            operators={operator.name: operator},
            groups=groups,
            space=Choice({operator.name: Space(experts, groups, depths, [searched])}),
            evaluator=cast(Any, SimpleNamespace()),
            objectives=tuple(
                Objective(name=name, task=name, metric="value", direction="max")
                for name in experts[: self.num_objectives]
            ),
            splits={},
            item_sources={},
            fidelity=None,
            losses=frozenset(),
        )

    def open(self, seed: int) -> Opened:
        """Base is the point 0, an expert that with its own coefficients at 1 and the others at 0."""
        plan = self.plan(seed)
        scorer, inputs = _Scorer(self, seed, plan), input_recipes(plan)
        references = {name: maximized(scorer.score(recipe, "test"), plan.objectives) for name, recipe in inputs.items()}
        searched = {name: scorer.score(recipe, "search") for name, recipe in inputs.items()}
        return Opened(self.campaign("auto", 1, seed), plan, scorer, references, searched)


@dataclass
class _Scorer:
    problem: Analytic
    seed: int
    plan: Plan

    def configure(self, stage_space: StageSpace) -> None:
        """Read points by a stage's space."""
        self.plan = self.plan.within(stage_space)

    def score(self, subject: Candidate | Recipe, split: Split) -> Measurement:
        """Score a model; its noise on search items is its own, and the same whenever it is scored."""
        recipe = subject if isinstance(subject, Recipe) else self.plan.recipe(subject.point)
        point_D = by_tensor(recipe, self.plan.tensors)[COEFFICIENT].ravel()
        values_M, stderr = self.problem.values(point_D), 0.0
        if split == "search" and self.problem.noise:
            stderr = self.problem.noise
            entropy = [self.seed, *point_D.view(np.uint32).tolist()]
            values_M = values_M + stderr * np.random.default_rng(entropy).standard_normal(len(values_M))
        scores = {
            f"expert{m}": Score(value=float(value), stderr=stderr, items=np.array([value], dtype=np.float32))
            for m, value in enumerate(values_M)
        }
        return Measurement(split=split, scores=scores, cost=1.0, seconds={})


def _random_hessian(rng: np.random.Generator, num_dimensions: int, condition: float) -> Floats:
    """Return a matrix with eigenvalues evenly spaced in logarithm, along random directions."""
    directions_DD, _ = np.linalg.qr(rng.standard_normal((num_dimensions, num_dimensions)))
    return np.asarray(directions_DD * np.geomspace(1.0, condition, num_dimensions) @ directions_DD.T)


ANALYTIC = {
    problem.name: problem
    for problem in (
        Analytic("convex", num_objectives=3, num_experts=4, num_layers=2, link="quadratic", twist=0.3),
        Analytic("concave", num_objectives=2, num_experts=4, num_layers=4, link="bell"),
        Analytic("linear", num_objectives=2, num_experts=4, num_layers=8, link="linear"),
        Analytic("noisy", num_objectives=2, num_experts=4, num_layers=1, link="quadratic", twist=0.3, noise=0.03),
        Analytic("four", num_objectives=4, num_experts=4, num_layers=8, link="quadratic", twist=0.3),
    )
}
