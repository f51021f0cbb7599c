"""The spaces of a campaign: from its sections to operators, groups, and what a point means.

Shape letters: K experts, G groups.
"""

from collections.abc import Collection, Mapping
from typing import Any

from evomerge.campaign.assemble import operator_type
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.sections import (
    BEST,
    CoefficientSection,
    DataFlowSection,
    Fixed,
    ParameterSection,
    RangeSection,
    ScaleSection,
    SpaceSection,
)
from evomerge.errors import CampaignError, did_you_mean
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.paths import path_depth
from evomerge.operators.operator import Operator
from evomerge.operators.passthrough import Passthrough
from evomerge.records import Floats, ParameterSpec, Recipe, TensorIndex
from evomerge.space.choice import Choice, is_coefficient
from evomerge.space.data_flow import SCALE, DataFlow
from evomerge.space.depth import group_depths
from evomerge.space.groups import Groups, make_groups
from evomerge.space.regroup import regrouped
from evomerge.space.shares import ShareOptions
from evomerge.space.space import Range, Searched, Setting, Space, check_setting
from evomerge.strict import parse


def make_space(
    campaign: Campaign, base: Checkpoint, experts: Mapping[str, Checkpoint | Adapter], tensors: TensorIndex
) -> tuple[Groups, dict[str, Operator], Choice | DataFlow]:
    """Return groups, operators and space of a campaign. Raises: CampaignError."""
    section = campaign.space
    if isinstance(section, DataFlowSection):
        space = make_data_flow(section, base, experts, tensors)
        return make_groups(tensors, "layer"), {Passthrough.name: Passthrough()}, space
    groups = make_groups(tensors, section.groups)
    return groups, *make_choice(campaign, section, tensors, groups)


def make_data_flow(
    section: DataFlowSection,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint | Adapter],
    tensors: TensorIndex,
    *,
    leader: str | None = None,
    left_out: Collection[str] = (),
) -> DataFlow:
    """Return the space of paths through the experts' layers; a leader that is none of them has its own before theirs.

    Raises: CampaignError if an expert's layers cannot stand in another model as they are.
    """
    for expert in experts.values():
        if isinstance(expert, Adapter):
            raise CampaignError(f"{expert.name}: an adapter has no layers of its own; merge it with the base first")
        if expert.alignment is not None:
            raise CampaignError(f"{expert.name}: another vocabulary than the base's; a data-flow space needs the same")
    scale = Range(**section.scale.model_dump()) if isinstance(section.scale, ScaleSection) else section.scale
    check_setting(SCALE, scale, "space.scale")
    return DataFlow(
        [*([leader] if leader else []), *experts],
        path_depth(base, tensors),
        repeats=section.repeats,
        max_layers=section.max_layers,
        scale=scale,
        left_out=left_out,
    )


def make_choice(
    campaign: Campaign,
    section: SpaceSection,
    tensors: TensorIndex,
    groups: Groups,
    found: Mapping[str, Recipe] | None = None,
    left_out: Collection[str] = (),
) -> tuple[dict[str, Operator], Choice]:
    """Return the operators and the choice between their spaces, which share experts, groups and coefficients."""
    operators: dict[str, Operator] = {}
    spaces: dict[str, Space] = {}
    depths = group_depths(tensors, groups)
    for where, given in campaign.operators.items():
        operator, settings = make_operator(given, where)
        best = regrouped(found[operator.name], groups, tensors) if found else {}
        searched = [
            _coefficient(spec, section, best.get(spec.name), left_out)
            if is_coefficient(spec.name)
            else _parameter(spec, settings.get(spec.name, spec.default), where, best.get(spec.name), left_out)
            for spec in operator.parameters
        ]
        operators[operator.name] = operator
        try:
            spaces[operator.name] = Space(list(campaign.experts), groups, depths, searched)
        except CampaignError as error:
            raise CampaignError(str(error) if where == "operator" else f"{where}: {error}") from error
    _require_use(section, operators)
    return operators, Choice(spaces)


def _require_use(section: SpaceSection, operators: Mapping[str, Operator]) -> None:
    """Refuse coefficients that no operator has; those of a preset are for the operators that have some."""
    given = (
        "exceptions" if section.exceptions else "coefficient" if section.coefficient != CoefficientSection() else None
    )
    if any(is_coefficient(spec.name) for operator in operators.values() for spec in operator.parameters):
        return
    if given and section.preset is None:
        raise CampaignError(
            f"space.{given}: there is no coefficient in {' or '.join(operators)}; give the numbers under operator"
        )


def _coefficient(
    spec: ParameterSpec, section: SpaceSection, best_KG: Floats | None, left_out: Collection[str]
) -> Searched:
    return Searched(
        spec=spec,
        setting=_setting(spec, section.coefficient, best_KG, "space.coefficient"),
        exceptions={
            place: _setting(spec, given, best_KG, f"space.exceptions.{place}")
            for place, given in section.exceptions.items()
        },
        left_out=dict.fromkeys(left_out, 0.0),
    )


def _parameter(
    spec: ParameterSpec, given: Any, where: str, best_KG: Floats | None, left_out: Collection[str]
) -> Searched:
    """Read what a campaign says of one of the operator's other parameters; a range is one number unless it says so."""
    where = f"{where}.{spec.name}"
    idle = dict.fromkeys(left_out, spec.default)  # of experts whose coefficient is 0
    if given == BEST:
        return Searched(spec=spec, setting=_setting(spec, given, best_KG, where), left_out=idle)
    if not isinstance(given, Mapping):
        number = fixed_number(given, where, " or {low, high, start, per, knots, exceptions}")
        return Searched(spec=spec, setting=number, left_out=idle)
    section = parse(ParameterSection, given, where)
    knots = None if section.per == "group" else section.knots or 1
    exceptions = {
        place: _setting(spec, given, best_KG, f"{where}.exceptions.{place}")
        for place, given in section.exceptions.items()
    }
    return Searched(spec=spec, setting=_range(spec, section, knots), exceptions=exceptions, left_out=idle)


def _setting(
    spec: ParameterSpec, given: Fixed | RangeSection | CoefficientSection, best_KG: Floats | None, where: str
) -> Setting:
    match given:
        case RangeSection() | CoefficientSection():
            return _range(spec, given, given.knots)
        case list():
            return tuple(given)
        case str():
            if best_KG is None:
                raise CampaignError(
                    f"{where}: best is what earlier stages have found, and there are none; give a number or a range"
                )
            return best_KG
        case _:
            return float(given)


def _range(spec: ParameterSpec, given: RangeSection | CoefficientSection, knots: int | None) -> Range:
    """Fill what a range leaves open from the operator's own: the default start is moved into the bounds."""
    shares = given.start if isinstance(given.start, ShareOptions) else None
    low = spec.low if given.low is None else given.low
    high = spec.high if given.high is None else given.high
    start = given.start if isinstance(given.start, float) else min(max(spec.default, low), high)
    return Range(low=low, high=high, start=start, knots=knots, shares=shares)


def make_operator(section: Mapping[str, Any], where: str = "operator") -> tuple[Operator, dict[str, Any]]:
    """Return the named operator with its options, and what the section says of its parameters."""
    of_name = operator_type(section.get("name"), f"{where}.name")
    options = {key: value for key, value in section.items() if key in of_name.options_type.model_fields}
    operator = of_name(parse(of_name.options_type, options, where))  # type: ignore[call-arg]
    parameters = [spec.name for spec in operator.parameters if not is_coefficient(spec.name)]
    settings = {key: value for key, value in section.items() if key not in options and key != "name"}
    for key in settings:
        if key not in parameters:
            if is_coefficient(key):
                raise CampaignError(f"{where}.coefficient: coefficients are given under space.coefficient")
            known = [*of_name.options_type.model_fields, *parameters]
            raise CampaignError(f"{where}.{key}: unknown key{did_you_mean(key, known)}")
    return operator, settings


def operator_of(recipe: Recipe) -> Operator:
    """Return the operator of a recipe, with its options."""
    return make_operator({"name": recipe.operator, **recipe.options})[0]


def fixed_number(given: Any, where: str, further: str = "") -> float | tuple[float, ...]:
    """Read a number, or a list of numbers over depth. Raises: CampaignError; further: what else may stand there."""
    numbers = given if isinstance(given, list) else [given]
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise CampaignError(f"{where}: expected a number or a list of numbers over depth{further}, found {given!r}")
    return tuple(map(float, numbers)) if isinstance(given, list) else float(given)
