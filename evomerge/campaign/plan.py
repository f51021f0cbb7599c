"""The plan: a checked campaign put together, everything but the weights.

What only a worker finds out, once it has the weights and has scored a few items, comes in by ``with_findings``: the
starts that the experts decide (before that, the operators' defaults stand in their place), and which losses there are.

Shape letters: K experts, G groups, S tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from evomerge.campaign.assemble import EVALUATORS
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.objectives import aggregate_of, make_objectives
from evomerge.campaign.sections import MERGED, DataFlowSection
from evomerge.campaign.spaces import make_choice, make_data_flow, make_space
from evomerge.errors import CampaignError
from evomerge.evaluators.evaluator import Evaluator
from evomerge.evaluators.several import SeveralEvaluators
from evomerge.evidence.scores import grouped
from evomerge.fidelity.race import RaceOptions
from evomerge.kernels.sources import Sources
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.inputs import open_checkpoints
from evomerge.materialize.merge import Merge, Source
from evomerge.materialize.paths import describe, path_of
from evomerge.materialize.residence import Place, Residence, choose_device
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.operators.passthrough import Passthrough
from evomerge.records import Floats, Objective, Recipe, Split, TensorIndex
from evomerge.space.choice import Choice
from evomerge.space.data_flow import DataFlow, Path
from evomerge.space.groups import Groups, make_groups
from evomerge.space.regroup import group_sizes, regrouped
from evomerge.space.shares import EXPONENTS, Measure
from evomerge.splits import TaskSplits, split_items


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a worker tells of its plan, once it has the weights and has rehearsed the evaluation.

    hashes: a checkpoint's folder -> SHA-256 of its tensors. items: the evaluator's digest. sums: each measure that
    starts derive from -> its sums over every task vector's tensors, (K, S). losses: names of the differentiable losses
    that there are.
    """

    hashes: Mapping[str, str]
    items: str
    sums: Mapping[Measure, Floats]
    losses: frozenset[str]

    def agrees(self, other: "Findings") -> bool:
        """Whether both read the same checkpoints and items."""
        return (self.hashes, self.items) == (other.hashes, other.items)


class StageSpace(NamedTuple):
    """By what a stage's points are read; merged: the merge that paths have layers of, too."""

    groups: Groups
    space: Choice | DataFlow
    merged: Recipe | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked campaign: everything but the weights. operators and objectives are in the order of the file.

    A stage's own plan differs from the campaign's in groups, space and merged (``with_space``).
    item_sources: task -> the source of each item, by which errors are clustered. losses: the evaluator's, or those that
    were found (``Findings``), as are sums.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint | Adapter]
    tensors: TensorIndex
    dtype: str
    place: Place
    operators: Mapping[str, Operator]
    groups: Groups
    space: Choice | DataFlow
    evaluator: Evaluator
    objectives: tuple[Objective, ...]
    splits: TaskSplits
    item_sources: Mapping[str, Sequence[int | str]]
    fidelity: RaceOptions | None
    losses: frozenset[str]
    sums: Mapping[Measure, Floats] | None = None
    merged: Recipe | None = None

    @property
    def num_parameters(self) -> int:
        """Number of merged numbers of the model."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Memory that the run holds: base, experts and the resident model, and once more of it beside paths through it.

        An adapter takes that of its factors, and of a whole model beside it if an operator needs its tensors whole.
        """
        return self.device_bytes["int8" if self.place.residence == "int8" else "resident"]

    @property
    def device_bytes(self) -> dict[Residence, int]:
        """What each residence holds on the device."""
        element_bytes = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return self.place.needed_bytes(self.num_parameters, element_bytes, list(self.experts.values()))

    @property
    def measured(self) -> list[Objective]:
        """The objectives that are a metric of a task, and no summary of others."""
        return [objective for objective in self.objectives if not objective.summary]

    @property
    def steering(self) -> list[Objective]:
        """The objectives that steer; the others are parts of summaries among them."""
        return [objective for objective in self.objectives if objective.steers]

    def sources(self, split: Split) -> dict[str, list[int | str]]:
        """Task -> the source of each item of a split."""
        return {task: [self.item_sources[task][item] for item in splits[split]] for task, splits in self.splits.items()}

    @property
    def rigid(self) -> str | None:
        """What has no gradient in any of its searched numbers: an operator that a point can choose, or the space."""
        if isinstance(self.space, DataFlow):
            return "a data-flow space"
        for branch in self.space.branches:
            operator = self.operators[branch.operator]
            searched = {dimension.parameter for dimension in branch.space.dimensions}
            fixed = {spec.name for spec in operator.parameters if spec.structural}
            if not operator.differentiable or (searched and searched <= fixed):
                return operator.name
        return None

    @property
    def stage_space(self) -> StageSpace:
        """All in which a stage's plan differs from the campaign's."""
        return StageSpace(self.groups, self.space, self.merged)

    def within(self, stage_space: StageSpace) -> "Plan":
        """Return the plan with the space of a stage."""
        return replace(self, groups=stage_space.groups, space=stage_space.space, merged=stage_space.merged)

    def measured_sums(self, sources: Sources) -> dict[Measure, Floats]:
        """Return the sums (K, S) of each measure that starts derive from; one pass over the weights for each."""
        if isinstance(self.space, DataFlow):
            return {}
        shares = [dimension.shares for branch in self.space.branches for dimension in branch.space.dimensions]
        asked = {options.by for options in shares if options and isinstance(options.by, str)}
        return {measure: np.asarray(sources.absolute_sums(EXPONENTS[measure]).numpy()) for measure in asked}

    def with_findings(self, findings: Findings) -> "Plan":
        """Return the plan with what a worker found, and so with the starts that are the experts' shares."""
        return replace(self, sums=findings.sums, losses=findings.losses).started()

    def started(self) -> "Plan":
        """Return the plan with these starts in its space, if they have been found."""
        if self.sums is None or isinstance(self.space, DataFlow):
            return self
        sums, place = self.sums, {tensor.name: s for s, tensor in enumerate(self.tensors)}
        columns = [[place[name] for name in names] for names in self.groups.values()]

        def sizes(measure: Measure) -> Floats:
            return np.stack([sums[measure][:, of_group].sum(axis=1) for of_group in columns], axis=1)

        return replace(self, space=self.space.with_starts(sizes))

    def recipe(self, point: Sequence[float] | Floats) -> Recipe:
        """Return the recipe of a point of the space, by the operator that it chooses, or of a path."""
        if isinstance(self.space, DataFlow):
            return self._laid(self.space.path(point), self.merged)
        branch = self.space.branch(point)
        values = branch.space.values(np.asarray(point)[branch.columns_d])
        return self._recipe(self.operators[branch.operator], self.groups, values)

    def point(self, recipe: Recipe) -> Floats:
        """Return the point (D,) whose recipe comes nearest to one of the plan's operators and experts, or to a path."""
        if isinstance(self.space, DataFlow):
            return self.space.nearest(path_of(recipe))
        values = regrouped(recipe, self.groups, self.tensors)
        return self.space.nearest(recipe.operator, values, group_sizes(self.groups, self.tensors))

    def as_held(self, recipe: Recipe) -> Recipe:
        """Return a recipe as the space would have it: where that has paths, a merge is the one of its own layers."""
        if isinstance(self.space, DataFlow) and not recipe.layers:
            return self._laid(self.space.own_layers, recipe)
        return recipe

    def _laid(self, path: Path, merged: Recipe | None) -> Recipe:
        """Return the recipe of a path through the layers of the experts and of the merge, if there is one."""
        leaders = {MERGED: merged} if merged else {}
        layers, groups, values = describe(self.tensors, len(leaders) + len(self.experts), path)
        recipe = self._recipe(Passthrough(), groups, values)
        return replace(recipe, experts={**leaders, **recipe.experts}, layers=layers)

    def task_arithmetic(self, coefficients: Sequence[float]) -> Recipe:
        """Return the reference recipe with one coefficient an expert: zeros are the base, one-hot is an expert."""
        groups = {"model": tuple(tensor.name for tensor in self.tensors)}
        return self._recipe(TaskArithmetic(), groups, {"coefficient": torch.tensor([coefficients]).T.double().numpy()})

    def _recipe(self, operator: Operator, groups: Groups, values: Mapping[str, Floats]) -> Recipe:
        recipe = make_recipe(operator, self.base, self.experts, self.dtype, groups, values)
        return replace(recipe, int8=self.place.residence == "int8")


def make_recipe(
    operator: Operator,
    base: Checkpoint,
    experts: Mapping[str, Source],
    dtype: str,
    groups: Groups,
    values: Mapping[str, Floats],
) -> Recipe:
    """Put a recipe together from parts that are checked; values are (K, G) or (1, G) matrices by parameter."""
    return Recipe(
        operator=operator.name,
        options=operator.options.model_dump(),
        base=str(base.folder),
        experts={
            name: expert.recipe if isinstance(expert, Merge) else str(expert.folder) for name, expert in experts.items()
        },
        dtype=dtype,
        groups=groups,
        values={name: tuple(map(tuple, matrix.tolist())) for name, matrix in values.items()},
    )


def make_plan(campaign: Campaign) -> Plan:
    """Check everything that can be checked without loading weights. Raises: InputError."""
    base, experts, tensors = open_checkpoints(campaign.base, campaign.experts)
    groups, operators, space = make_space(campaign, base, experts, tensors)
    evaluator = _make_evaluator(campaign, base)
    objectives = make_objectives(campaign, evaluator)
    aggregated = next((objective for objective in objectives if aggregate_of(objective, evaluator)), None)
    if campaign.fidelity and aggregated:
        raise CampaignError(
            f"fidelity: objective {aggregated.name}: {aggregated.metric} is no mean over items and cannot be raced; "
            "leave fidelity out, or take loss as the metric"
        )
    return Plan(
        base=base,
        experts=experts,
        tensors=tensors,
        dtype=base.dtype if campaign.dtype == "auto" else campaign.dtype,
        place=Place(
            device=choose_device(campaign.device),
            residence=campaign.residence,
            factored=all(operator.reads_factors for operator in operators.values()),
            keeps_merge=campaign.lays_paths_through_merges,
        ),
        operators=operators,
        groups=groups,
        space=space,
        evaluator=evaluator,
        objectives=objectives,
        splits=split_items(evaluator.sources, campaign.split.shares(), campaign.seed),
        item_sources=grouped(evaluator.sources) if aggregated else evaluator.sources,
        fidelity=campaign.fidelity,
        losses=evaluator.losses,
    )


def with_space(plan: Plan, campaign: Campaign, merges: Sequence[Recipe], left_out: Collection[str] = ()) -> Plan:
    """Return the plan with the space of a campaign whose space and parameters, and no more, are other ones.

    merges: of earlier stages, the best first; paths are laid through that one, and ``best`` stands for each operator's
    first. left_out: experts whose coefficients are 0, or whose layers are in no path.
    Raises: CampaignError.
    """
    section = campaign.space
    if isinstance(section, DataFlowSection):
        flow = make_data_flow(section, plan.base, plan.experts, plan.tensors, leader=MERGED, left_out=left_out)
        return replace(plan, space=flow, merged=merges[0])
    found = {recipe.operator: recipe for recipe in reversed(merges)}
    groups = make_groups(plan.tensors, section.groups)
    _, space = make_choice(campaign, section, plan.tensors, groups, found, left_out)
    return replace(plan, groups=groups, space=space).started()


def _make_evaluator(campaign: Campaign, base: Checkpoint) -> Evaluator:
    made = {
        section.where: EVALUATORS[section.kind].make(section.options, section.wanted, base.folder)
        for section in campaign.evaluators
    }
    if len(made) == 1:
        return next(iter(made.values()))
    return SeveralEvaluators({task: made[section.where] for section in campaign.evaluators for task in section.wanted})
