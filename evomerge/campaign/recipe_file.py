"""The recipe file: one merge, every coefficient written out.

operator: {name: task_arithmetic}
base: path or Hugging Face id
experts: {rot90: path, mod5: path, invert: path}
dtype: float32                        # optional: the base's
groups: layer                         # optional: as in a campaign's space; a written recipe lists its tensors
coefficient:                          # and the operator's other parameters; defaults where left out
  rot90: 0.4
  mod5: [0, 0.5, 1]                   # evenly spaced over the depth of the network, straight lines between
  invert: {before: 0.1, "layer[0-2]": 0.3, "*": [0.2, 0.4]}   # by pattern of groups: the first that matches wins

Experts may be given by pattern too. Every expert and every group needs a number, and every pattern something to match.

experts:                              # an expert can be a merge itself: of the same base, and as this file has it
  merged: {operator: {name: ties}, experts: {rot90: path, mod5: path}, coefficient: 0.7, density: 0.3}
  invert: path

out_dtype: bfloat16                   # optional: what the result is rounded to
int8: true                            # optional: task vectors rounded to 8 bits, as under residence: int8
layers:                               # optional: a model of other layers, from the first to the last
  - {experts: {rot90: [0, 3]}}                # [0, 3]: layers 0, 1 and 2; other experts have coefficient 0 there
  - {base: [1, 4], experts: {mod5: [1, 4]}}   # base: where the operator merges task vectors
"""

import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field

from evomerge.campaign.campaign import locate
from evomerge.campaign.plan import make_recipe
from evomerge.campaign.spaces import fixed_number, make_operator, operator_of
from evomerge.errors import CampaignError, did_you_mean
from evomerge.materialize.arrangement import Output, rows_of
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.inputs import open_sources
from evomerge.materialize.merge import Merge, Source
from evomerge.operators.operator import Operator
from evomerge.records import Floats, Layers, Options, ParameterSpec, Recipe, TensorIndex
from evomerge.space.choice import COEFFICIENT
from evomerge.space.depth import Depths, group_depths
from evomerge.space.groups import Groups, first_match, make_groups
from evomerge.space.space import at_depth, check_setting
from evomerge.strict import Section, parse, read_yaml

Span = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Layers from the first number up to, not including, the second."""


class LayersSection(Options):
    """Layers of the merged model that follow each other in each of their sources, too."""

    base: Span | None = None
    experts: dict[str, Span] = {}


class MergeSection(Options):
    """The fixed part of a merge; the operator's parameters stand beside it."""

    operator: dict[str, Any] = {"name": "task_arithmetic"}
    experts: dict[str, str | dict[str, Any]]
    groups: str | dict[str, str | list[str]] = "model"


class RecipeSection(MergeSection):
    """The fixed part of a recipe file."""

    base: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    int8: bool = False
    layers: Annotated[list[LayersSection], Field(min_length=1)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRecipe:
    """A recipe with the checkpoints and the operator that it names; notes say what has no effect in the file."""

    recipe: Recipe
    base: Checkpoint
    experts: tuple[Source, ...]
    operator: Operator
    notes: tuple[str, ...] = ()

    @property
    def output(self) -> Output:
        """How the merged model differs from the base."""
        return Output(self.recipe.out_dtype, self.recipe.layers)


def read_recipe(path: Path) -> ReadRecipe:
    """Read a recipe file and check it against its checkpoints. Raises: InputError that names the key."""
    data = read_yaml(path)
    try:
        section, given = _split(RecipeSection, data)
        read = _read(section, given, section, path.resolve().parent)
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__
    out_dtype = section.out_dtype if section.out_dtype != read.recipe.dtype else None
    return replace(read, recipe=replace(read.recipe, out_dtype=out_dtype))


def _split(section: type[Section], data: Mapping[str, Any]) -> tuple[Section, dict[str, Any]]:
    """Return the fixed part of a merge, and the rest."""
    fixed = {key: value for key, value in data.items() if key in section.model_fields}
    return parse(section, fixed, ""), {key: value for key, value in data.items() if key not in fixed}


def _read(section: MergeSection, given: Mapping[str, Any], file: RecipeSection, folder: Path) -> ReadRecipe:
    """Read a merge, the file's or one within it; given are the operator's parameters."""
    operator, inside = make_operator(section.operator)
    if inside:
        raise CampaignError(f"operator.{next(iter(inside))}: a recipe gives parameters beside operator, not inside it")
    specs = {spec.name: spec for spec in operator.parameters}
    if unknown := sorted(given.keys() - specs.keys()):
        raise CampaignError(
            f"{unknown[0]}: unknown key{did_you_mean(unknown[0], [*specs, *type(section).model_fields])}"
        )
    located = {
        name: locate(held, folder) if isinstance(held, str) else _read_merge(name, held, file, folder)
        for name, held in section.experts.items()
    }
    layers = _read_layers(file.layers, list(located)) if section is file and file.layers else None
    base, experts, tensors = open_sources(locate(file.base, folder), located, layers)
    groups = make_groups(tensors, _grouping(section))
    places = _Places(list(experts), list(groups), group_depths(tensors, groups))
    values = {name: _matrix(spec, given.get(name), places) for name, spec in specs.items()}
    if layers:
        groups, values = _leave_out(operator, tensors, layers, groups, values)
    dtype = base.dtype if file.dtype == "auto" else file.dtype
    recipe = replace(make_recipe(operator, base, experts, dtype, groups, values), layers=layers, int8=file.int8)
    return ReadRecipe(recipe=recipe, base=base, experts=tuple(experts.values()), operator=operator)


def _read_merge(name: str, given: Mapping[str, Any], file: RecipeSection, folder: Path) -> Merge:
    """Read an expert that is a merge itself; base, dtype and int8 are the file's."""
    try:
        section, numbers = _split(MergeSection, given)
        read = _read(section, numbers, file, folder)
    except CampaignError as error:
        raise CampaignError(f"experts.{name}: {error}") from error.__cause__
    return Merge(
        name=f"expert {name}", recipe=read.recipe, operator=read.operator, base=read.base, experts=read.experts
    )


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe file that ``read_recipe`` reads back to the same recipe."""
    merge = _written(recipe)
    data = {
        "operator": merge["operator"],
        "base": recipe.base,
        "experts": merge["experts"],
        "dtype": recipe.dtype,
        **({"out_dtype": recipe.out_dtype} if recipe.out_dtype else {}),
        **({"int8": True} if recipe.int8 else {}),
        **({"layers": _write_layers(recipe.layers, list(recipe.experts))} if recipe.layers else {}),
        **merge,
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=120))


def _written(recipe: Recipe) -> dict[str, Any]:
    """Return what ``_read`` reads back, but for what a whole file shares."""
    rows = {name: [_number(row, recipe.groups) for row in matrix] for name, matrix in recipe.values.items()}
    matrices = {
        spec.name: dict(zip(map(glob.escape, recipe.experts), rows[spec.name], strict=True))
        if spec.per_expert
        else rows[spec.name][0]
        for spec in operator_of(recipe).parameters
    }
    return {
        "operator": {"name": recipe.operator, **recipe.options},
        "experts": {
            name: _written(held) if isinstance(held, Recipe) else held for name, held in recipe.experts.items()
        },
        **matrices,
        "groups": "tensor"
        if all(tensors == (group,) for group, tensors in recipe.groups.items())
        else {group: list(tensors) for group, tensors in recipe.groups.items()},
    }


def _read_layers(sections: Sequence[LayersSection], experts: list[str]) -> Layers:
    """Return which layers of the base and the experts each layer of the merged model is made of."""
    rows: list[tuple[int | None, ...]] = []
    for number, section in enumerate(sections):
        where = f"layers[{number}]"
        for name in section.experts:
            if name not in experts:
                raise CampaignError(f"{where}.experts.{name}: unknown expert{did_you_mean(name, experts)}")
        spans = [section.base, *map(section.experts.get, experts)]
        lengths = {span[1] - span[0] for span in spans if span}
        if not section.experts or len(lengths) != 1 or min(lengths) < 1:
            raise CampaignError(f"{where}: expected [first, end] of at least one expert, all of the same length")
        rows += [tuple(span[0] + i if span else None for span in spans) for i in range(lengths.pop())]
    return tuple(rows)


def _write_layers(layers: Layers, experts: Sequence[str]) -> list[dict[str, Any]]:
    """Return what ``_read_layers`` reads back: runs of layers, as long as they can be."""
    runs: list[list[tuple[int | None, ...]]] = []
    for row in layers:
        if runs and row == tuple(None if number is None else number + 1 for number in runs[-1][-1]):
            runs[-1].append(row)
        else:
            runs.append([row])
    sections: list[dict[str, Any]] = []
    for run in runs:
        base, *spans = [None if number is None else [number, number + len(run)] for number in run[0]]
        by_name = {name: span for name, span in zip(experts, spans, strict=True) if span}
        sections.append({**({"base": base} if base else {}), "experts": by_name})
    return sections


def _leave_out(
    operator: Operator, tensors: TensorIndex, layers: Layers, groups: Groups, values: Mapping[str, Floats]
) -> tuple[Groups, dict[str, Floats]]:
    """Give every tensor its own numbers, and an expert the coefficient 0 where it is no source."""
    names = [tensor.name for tensor in tensors]
    group_of = {name: g for g, members in enumerate(groups.values()) for name in members}
    by_tensor = {name: matrix[:, [group_of[tensor] for tensor in names]] for name, matrix in values.items()}
    is_absent_KS = np.array([[number is None for number in row[1:]] for row in rows_of(names, layers)]).T
    if COEFFICIENT in by_tensor:
        by_tensor[COEFFICIENT] = np.where(is_absent_KS, 0.0, by_tensor[COEFFICIENT])
    elif is_absent_KS.any():
        raise CampaignError(f"layers: {operator.name} merges the same experts everywhere; give all of them in each")
    return {name: (name,) for name in names}, by_tensor


def _grouping(section: MergeSection) -> Any:
    words = ("model", "layer", "module", "tensor")
    if isinstance(section.groups, str) and section.groups not in words:
        raise CampaignError(f"groups: expected {', '.join(words)} or a mapping, found {section.groups!r}")
    return section.groups


@dataclass(frozen=True, slots=True)
class _Places:
    """What the numbers of a recipe are for."""

    experts: list[str]
    groups: list[str]
    depths: Depths


def _matrix(spec: ParameterSpec, given: Any, places: _Places) -> Floats:
    """Return the (K, G) numbers of what the file says of a parameter: of all experts, or by pattern of experts."""
    if not spec.per_expert:
        return np.array([_row(spec, spec.name, given, places)])
    if not isinstance(given, Mapping):
        return np.array([_row(spec, spec.name, given, places)] * len(places.experts))
    given = {str(pattern): inner for pattern, inner in given.items()}
    followed = _match(given, places.experts, spec.name, "expert", "; give every expert one (0 leaves it out)")
    rows = {pattern: _row(spec, f"{spec.name}.{pattern}", inner, places) for pattern, inner in given.items()}
    return np.array([rows[pattern] for pattern in followed])


def _row(spec: ParameterSpec, where: str, given: Any, places: _Places) -> list[float]:
    """Return the (G,) numbers of what the file says of an expert: of all groups, or by pattern of groups."""
    if not isinstance(given, Mapping):
        return _fixed(spec, where, given, places.groups, places.depths)
    given = {str(pattern): inner for pattern, inner in given.items()}
    followed = _match(given, places.groups, where, "group")
    row: dict[str, float] = {}
    for pattern, inner in given.items():
        groups = [group for group, other in zip(places.groups, followed, strict=True) if other == pattern]
        numbers = _fixed(spec, f"{where}.{pattern}", inner, groups, places.depths)
        row.update(zip(groups, numbers, strict=True))
    return [row[group] for group in places.groups]


def _fixed(spec: ParameterSpec, where: str, given: Any, groups: Sequence[str], depths: Depths) -> list[float]:
    """Return a number a group: the same for all, or interpolated over depth; the default where nothing is given."""
    fixed = fixed_number(spec.default if given is None else given, where)
    check_setting(spec, fixed, where)
    return [at_depth(fixed, group, depths, where) for group in groups]


def _match(patterns: Collection[str], names: Sequence[str], where: str, kind: str, advice: str = "") -> list[str]:
    """Return the pattern that each name follows. Raises: CampaignError for a pattern or a name that is left over."""
    followed = {name: first_match(patterns, name) for name in names}
    for pattern in patterns:
        if pattern not in followed.values():
            is_late = any(first_match([pattern], name) for name in names)
            reason = f"unknown {kind}{did_you_mean(pattern, names)}"
            raise CampaignError(
                f"{where}.{pattern}: {f'no {kind} is left for it: the first that matches wins' if is_late else reason}"
            )
    for name, found in followed.items():
        if found is None:
            raise CampaignError(f"{where}: no number for {kind} {name}{advice}")
    return [pattern for pattern in followed.values() if pattern is not None]


def _number(row: tuple[float, ...], groups: Mapping[str, tuple[str, ...]]) -> Any:
    """One number where all groups agree, else one a group; a group's name is no pattern, whatever it holds."""
    return row[0] if len(set(row)) == 1 else dict(zip(map(glob.escape, groups), row, strict=True))
