"""The course of a campaign through the spaces of its stages, each of which derives from the file and earlier trials.

    search[0] -> space -> trials --the best recipe--> search[1] -> space -> trials --the best recipe--> ...

What a stage inherits is told in its own coordinates: where the best recipe of the earlier stages lies, and those of
their trials whose recipes its space holds. All of it is a function of the trials that had their results when the stage
issued its first: a resumed run, an extended one and an export find the same spaces again.

Shape letters: K experts, T tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Plan, with_space
from evomerge.campaign.references import input_recipes
from evomerge.campaign.sections import SpaceChanges
from evomerge.errors import CampaignError
from evomerge.front.front import observe, observed, worst_of_inputs
from evomerge.proposers.proposer import Problem, rank
from evomerge.records import Floats, Measurement, Observation, Recipe, TensorIndex, Trial, in_order
from evomerge.space.choice import COEFFICIENT, Choice
from evomerge.space.data_flow import DataFlow
from evomerge.space.regroup import by_tensor

ROUNDING = 1e-9  # of a recipe's numbers on their way through a space


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A stage as it begins: the campaign's plan with the stage's space, and what its proposer is told (``Problem``).

    changes: how the space differs from the campaign's. ancestor: number of the best trial of the earlier stages.
    merged: that of the trial whose merge paths are laid through. left_out: experts that the stage does without.
    """

    changes: SpaceChanges
    plan: Plan
    history: tuple[Observation, ...] = ()
    best: Observation | None = None
    ancestor: int | None = None
    merged: int | None = None
    left_out: tuple[str, ...] = ()

    def problem(self, seed: tuple[int, ...], searched: Mapping[str, Measurement] | None = None) -> Problem:
        """Return what the stage's proposer is told when it is made.

        searched: what is measured on search items, base and all experts among it; None before anything is.
        """
        return Problem(
            dimensions=self.plan.space.dimensions,
            num_objectives=len(self.plan.steering),
            seed=seed,
            tasks=tuple(self.plan.splits),
            experts=tuple(self.plan.experts),
            reference_M=worst_of_inputs(searched, self.plan.objectives) if searched else None,
            inputs=_inputs(self.plan, searched) if searched else (),
            history=self.history,
            best=self.best,
        )

    def facts(self) -> dict[str, Any]:
        """Return what readers of a run need to know of the stage, as JSON."""
        changes = self.changes.model_dump(mode="json")
        inherited = {"ancestor": self.ancestor, "merged": self.merged, "left_out": self.left_out}
        return {"changes": changes, **inherited, **described(self.plan)}


class Course:
    """The stages of one run; changes say for each how its space differs from the campaign's."""

    def __init__(self, campaign: Campaign, plan: Plan, changes: Sequence[SpaceChanges]) -> None:
        self._campaign, self._plan, self._changes = campaign, plan, changes
        self._legs: list[Leg] = []

    def leg(self, number: int, trials: Sequence[Trial]) -> Leg:
        """Return a stage; trials are all of the run, in the order of issue, with the scores of summaries.

        Where no earlier trial has succeeded, the start of the stage before stands in for the best. Raises:
        CampaignError.
        """
        while len(self._legs) <= number:
            self._legs.append(self._begin(len(self._legs), trials))
        return self._legs[number]

    def recipe(self, trial: Trial) -> Recipe:
        """Return the recipe of a trial whose stage has begun, by the space of that stage."""
        return self._legs[trial.stage].plan.recipe(trial.point)

    def _begin(self, number: int, trials: Sequence[Trial]) -> Leg:
        changes, plan, left_out = self._changes[number], self._plan, tuple[str, ...]()
        earlier = _before(number, trials)
        scored = [trial for trial in earlier if trial.measurement]
        ancestor = max(scored, key=self._rank, default=None)
        merge = max((trial for trial in scored if self._is_merge(trial)), key=self._rank, default=None)
        if changes != SpaceChanges():
            merges = self._merges(number, merge)
            if changes.keep_experts:
                left_out = _left_out(plan, merges[0] if merges else None, changes.keep_experts)
            plan = with_space(plan, self._campaign.changed(changes), merges, left_out)
        if not plan.space.dimensions:
            raise CampaignError("space: nothing is searched; give at least one number a range {low: ..., high: ...}")
        moved = {trial.number: self._moved(trial, plan) for trial in earlier}
        return Leg(
            changes=changes,
            plan=plan,
            history=tuple(observation for observation, is_held in moved.values() if is_held),
            best=moved[ancestor.number][0] if ancestor else None,
            ancestor=ancestor.number if ancestor else None,
            merged=merge.number if merge and plan.merged else None,
            left_out=left_out,
        )

    def _is_merge(self, trial: Trial) -> bool:
        """Whether a trial merges weights, and lays no path."""
        return isinstance(self._legs[trial.stage].plan.space, Choice)

    def _merges(self, number: int, best: Trial | None) -> list[Recipe]:
        """Return the best merge, and those where the last stage that merges weights started, one an operator."""
        plans = [leg.plan for leg in self._legs[:number] if isinstance(leg.plan.space, Choice)]
        starts = [plan.recipe(start_D) for plan in plans[-1:] for start_D in plan.space.starts]
        return [self.recipe(best), *starts] if best else starts

    def _moved(self, trial: Trial, plan: Plan) -> tuple[Observation, bool]:
        """Return an earlier result at the point nearest to its recipe, and whether that point has the same recipe."""
        observation = observe(trial, plan.objectives)
        if self._legs[trial.stage].plan is plan:
            return observation, True
        point_D, is_held = _located(self.recipe(trial), plan)
        return replace(observation, point=point_D, arrival=None), is_held

    def _rank(self, trial: Trial) -> float:
        return rank(observe(trial, self._plan.objectives))


def _inputs(plan: Plan, searched: Mapping[str, Measurement]) -> tuple[Observation, ...]:
    """Return the results of base and experts whose recipes the space holds; a space of paths holds none."""
    if not isinstance(plan.space, Choice):
        return ()
    found: list[Observation] = []
    for name, recipe in input_recipes(plan).items():
        if recipe.operator in plan.operators:
            point_D, is_held = _located(recipe, plan)
            if is_held:
                found.append(observed(len(found), point_D, searched[name], plan.objectives))
    return tuple(found)


def _located(recipe: Recipe, plan: Plan) -> tuple[Floats, bool]:
    """Return the point of a plan's space that is nearest to a recipe, and whether that point has the same recipe."""
    held = plan.as_held(recipe)
    point_D = plan.point(held)
    return point_D, _is_same(held, plan.recipe(point_D), plan.tensors)


def described(plan: Plan) -> dict[str, Any]:
    """Return the dimensions of a plan's space, and the numbers that it keeps, as JSON; of several operators, each's."""
    facts: dict[str, Any] = {"space": [asdict(dimension) for dimension in plan.space.dimensions]}
    if isinstance(plan.space, DataFlow):
        return facts
    branches = {
        branch.operator: {
            "columns": branch.columns_d.tolist(),
            "space": [asdict(dimension) for dimension in branch.space.dimensions],
            "kept": [asdict(kept) for kept in branch.space.kept],
        }
        for branch in plan.space.branches
    }
    if len(branches) > 1:
        return {**facts, "choice": branches}
    return {**facts, "kept": next(iter(branches.values()))["kept"]}


def _before(number: int, trials: Sequence[Trial]) -> list[Trial]:
    """Return the results of earlier stages that were known when a stage issued its first trial, in their order."""
    known = next((trial.known for trial in trials if trial.stage == number), len(trials))
    return [trial for trial in in_order(trials)[:known] if trial.stage < number]


def _left_out(plan: Plan, best: Recipe | None, num_kept: int) -> tuple[str, ...]:
    """Return the experts whose coefficients in a recipe are smallest, in the mean of their sizes over all elements."""
    if best is None:
        raise CampaignError("keep_experts: earlier stages say which experts matter, and there are none")
    if num_kept >= len(best.experts):
        raise CampaignError(f"keep_experts: expected fewer than the {len(best.experts)} experts, found {num_kept}")
    for name, operator in plan.operators.items():
        if COEFFICIENT not in [spec.name for spec in operator.parameters]:
            raise CampaignError(f"keep_experts: experts are judged by their coefficients, and {name} has none")
    sizes_T = np.array([tensor.num_elements for tensor in plan.tensors])
    importance_K = np.abs(by_tensor(best, plan.tensors)[COEFFICIENT]) @ sizes_T
    names = list(best.experts)
    return tuple(names[k] for k in sorted(np.argsort(-importance_K, kind="stable")[num_kept:]))


def _is_same(one: Recipe, other: Recipe, tensors: TensorIndex) -> bool:
    """Whether two recipes of one campaign make the same model: one operator, and the same numbers for every tensor."""
    if (one.operator, one.experts, one.layers) != (other.operator, other.experts, other.layers):
        return False
    # Of paths with the same layers, the groups are the same too: one a tensor of the path's own.
    numbers, others = [r.values if r.layers else by_tensor(r, tensors) for r in (one, other)]
    return all(np.allclose(numbers[name], others[name], rtol=ROUNDING, atol=ROUNDING) for name in numbers)
