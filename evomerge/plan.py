"""The plan: a checked campaign put together, everything but the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.assemble import EVALUATORS, OPERATORS, look_up
from evomerge.campaign import Campaign, ParameterSection, RangeSection
from evomerge.errors import CampaignError, did_you_mean
from evomerge.evaluators.evaluator import Evaluator
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint, require_same_tensors
from evomerge.materialize.resident import empty_model, tensor_index, tied_names
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.records import Floats, Objective, ParameterSpec, Recipe, TensorIndex
from evomerge.space.groups import Groups, make_groups
from evomerge.space.space import Range, Searched, Setting, Space
from evomerge.splits import TaskSplits, split_items
from evomerge.strict import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked campaign: everything but the weights."""

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    tensors: TensorIndex
    dtype: str
    device: str
    operator: Operator
    space: Space
    evaluator: Evaluator
    objectives: tuple[Objective, ...]
    splits: TaskSplits

    @property
    def num_parameters(self) -> int:
        """Number of merged numbers of the model."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Memory that the run holds: base, experts and the resident model."""
        return (len(self.experts) + 2) * self.num_parameters * torch.finfo(getattr(torch, self.dtype)).bits // 8

    def recipe(self, point: Sequence[float] | Floats) -> Recipe:
        """Return the recipe of a point of the space."""
        return self._recipe(self.operator, self.space.groups, self.space.values(point))

    def task_arithmetic(self, coefficients: Sequence[float]) -> Recipe:
        """Return the reference recipe with one coefficient an expert: zeros are the base, one-hot is an expert."""
        groups = {"model": tuple(tensor.name for tensor in self.tensors)}
        return self._recipe(TaskArithmetic(), groups, {"coefficient": torch.tensor([coefficients]).T.double().numpy()})

    def _recipe(self, operator: Operator, groups: Groups, values: Mapping[str, Floats]) -> Recipe:
        return make_recipe(operator, self.base, self.experts, self.dtype, groups, values)


def make_recipe(
    operator: Operator,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    dtype: str,
    groups: Groups,
    values: Mapping[str, Floats],
) -> Recipe:
    """Put a recipe together from parts that are checked; values are (K, G) or (1, G) matrices by parameter."""
    return Recipe(
        operator=operator.name,
        options=operator.options.model_dump(),
        base=str(base.folder),
        experts={name: str(expert.folder) for name, expert in experts.items()},
        dtype=dtype,
        groups=groups,
        values={name: tuple(map(tuple, matrix.tolist())) for name, matrix in values.items()},
    )


def make_plan(campaign: Campaign) -> Plan:
    """Check everything that can be checked without loading weights. Raises: InputError."""
    base, experts, tensors = open_checkpoints(campaign.base, campaign.experts)
    operator, settings = make_operator(campaign.operator)
    space = _make_space(campaign, tensors, operator, settings)
    tasks = list(dict.fromkeys(objective.task for objective in campaign.objectives))
    entry = EVALUATORS[campaign.evaluation["kind"]]
    evaluator = entry.make(campaign.evaluation_options(), tasks, base.folder)
    return Plan(
        base=base,
        experts=experts,
        tensors=tensors,
        dtype=base.dtype if campaign.dtype == "auto" else campaign.dtype,
        device=choose_device(campaign.device),
        operator=operator,
        space=space,
        evaluator=evaluator,
        objectives=_objectives(campaign, evaluator),
        splits=split_items(evaluator.sources, campaign.split.shares(), campaign.seed),
    )


def open_checkpoints(base: str, experts: Mapping[str, str]) -> tuple[Checkpoint, dict[str, Checkpoint], TensorIndex]:
    """Open base and experts and compare their tensors; return them with the list of what is merged."""
    opened = open_checkpoint("base", base)
    others = {name: open_checkpoint(f"expert {name}", location) for name, location in experts.items()}
    model = empty_model(opened)
    for expert in others.values():
        require_same_tensors(opened, expert, tied_names(model))
    return opened, others, tensor_index(model)


def make_operator(section: Mapping[str, Any]) -> tuple[Operator, dict[str, Any]]:
    """Return the named operator with its options, and what the section says of its parameters."""
    operator_type = look_up(OPERATORS, section.get("name"), "operator", "operator.name")
    options = {key: value for key, value in section.items() if key in operator_type.options_type.model_fields}
    operator = operator_type(parse(operator_type.options_type, options, "operator"))  # type: ignore[call-arg]
    parameters = [spec.name for spec in operator.parameters[1:]]
    settings = {key: value for key, value in section.items() if key not in options and key != "name"}
    for key in settings:
        if key not in parameters:
            if key == "coefficient":
                raise CampaignError("operator.coefficient: coefficients are given under space.coefficient")
            known = [*operator_type.options_type.model_fields, *parameters]
            raise CampaignError(f"operator.{key}: unknown key{did_you_mean(key, known)}")
    return operator, settings


def choose_device(asked: str) -> str:
    """Return the device to merge and score on: what was asked for, or a GPU where there is one."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CampaignError(f"device: {asked!r} cannot be used here ({reason}); try auto or cpu") from error
    return asked


def _make_space(campaign: Campaign, tensors: TensorIndex, operator: Operator, settings: Mapping[str, Any]) -> Space:
    first, *others = operator.parameters
    section = campaign.space
    coefficients = Searched(
        spec=first,
        setting=_setting(first, section.coefficient),
        exceptions={place: _setting(first, given) for place, given in section.exceptions.items()},
    )
    searched = [coefficients, *(_searched(spec, settings.get(spec.name, spec.default)) for spec in others)]
    return Space(list(campaign.experts), make_groups(tensors, section.groups), searched)


def _searched(spec: ParameterSpec, given: Any) -> Searched:
    """Read what a campaign says of one of the operator's other parameters."""
    where = f"operator.{spec.name}"
    if isinstance(given, bool) or not isinstance(given, int | float | dict):
        raise CampaignError(f"{where}: expected a number or {{low, high, start, per}}, found {given!r}")
    if not isinstance(given, dict):
        return Searched(spec=spec, setting=float(given), by_group=False)
    section = parse(ParameterSection, given, where)
    return Searched(spec=spec, setting=_setting(spec, section), by_group=section.per == "group")


def _setting(spec: ParameterSpec, given: float | RangeSection) -> Setting:
    """Fill what a range leaves open from the operator's own: the default start is moved into the bounds."""
    if isinstance(given, int | float):
        return float(given)
    low = spec.low if given.low is None else given.low
    high = spec.high if given.high is None else given.high
    start = min(max(spec.default, low), high) if given.start is None else given.start
    return Range(low=low, high=high, start=start)


def _objectives(campaign: Campaign, evaluator: Evaluator) -> tuple[Objective, ...]:
    objectives = []
    for number, section in enumerate(campaign.objectives):
        metrics = evaluator.metrics(section.task)
        if section.metric not in metrics:
            known = did_you_mean(section.metric, metrics)
            raise CampaignError(f"objectives[{number}].metric: task {section.task} has no {section.metric!r}{known}")
        direction = section.direction or metrics[section.metric]
        if direction != metrics[section.metric]:
            raise CampaignError(
                f"objectives[{number}].direction: {section.metric} is better "
                f"{'larger' if direction == 'min' else 'smaller'}; leave the direction out"
            )
        objectives.append(Objective(**{**section.model_dump(), "direction": direction}))
    return tuple(objectives)
