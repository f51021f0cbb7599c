"""The recipe file: one merge, every coefficient written out.

operator: {name: task_arithmetic}
base: path or Hugging Face id
experts: {rot90: path, invert: path}
dtype: float32                        # optional: the base's
groups: layer                         # optional: as in a campaign's space; a written recipe lists its tensors
coefficient:                          # and the operator's other parameters; defaults where left out
  rot90: 0.4
  invert: {before: 0.1, layer0: 0.3, after: 0.2}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from evomerge.campaign import locate
from evomerge.errors import CampaignError, did_you_mean
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.operators.operator import Operator
from evomerge.plan import make_operator, make_recipe, open_checkpoints
from evomerge.records import Floats, Options, ParameterSpec, Recipe
from evomerge.space.groups import Groups, make_groups
from evomerge.strict import parse, read_yaml


class RecipeSection(Options):
    """The fixed part of a recipe file; the operator's parameters stand beside it."""

    operator: dict[str, Any] = {"name": "task_arithmetic"}
    base: str
    experts: dict[str, str]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    groups: str | dict[str, str | list[str]] = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRecipe:
    """A recipe with the checkpoints and the operator that it names."""

    recipe: Recipe
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    operator: Operator


def read_recipe(path: Path) -> ReadRecipe:
    """Read a recipe file and check it against its checkpoints. Raises: InputError that names the key."""
    data = read_yaml(path)
    fixed = {key: value for key, value in data.items() if key in RecipeSection.model_fields}
    given = {key: value for key, value in data.items() if key not in fixed}
    try:
        section = parse(RecipeSection, fixed, "")
        operator, inside = make_operator(section.operator)
        if inside:
            raise CampaignError(
                f"operator.{next(iter(inside))}: a recipe gives parameters beside operator, not inside it"
            )
        specs = {spec.name: spec for spec in operator.parameters}
        if unknown := sorted(given.keys() - specs.keys()):
            raise CampaignError(
                f"{unknown[0]}: unknown key{did_you_mean(unknown[0], [*specs, *RecipeSection.model_fields])}"
            )
        folder = path.resolve().parent
        located = {name: locate(location, folder) for name, location in section.experts.items()}
        base, experts, tensors = open_checkpoints(locate(section.base, folder), located)
        groups = make_groups(tensors, _grouping(section))
        values = {name: _matrix(spec, given.get(name), list(experts), groups) for name, spec in specs.items()}
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__
    dtype = base.dtype if section.dtype == "auto" else section.dtype
    recipe = make_recipe(operator, base, experts, dtype, groups, values)
    return ReadRecipe(recipe=recipe, base=base, experts=tuple(experts.values()), operator=operator)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe file that ``read_recipe`` reads back to the same recipe."""
    matrices = {
        name: dict(zip(recipe.experts, (_number(row, recipe.groups) for row in rows), strict=True))
        if len(rows) == len(recipe.experts)
        else _number(rows[0], recipe.groups)
        for name, rows in recipe.values.items()
    }
    data = {
        "operator": {"name": recipe.operator, **recipe.options},
        "base": recipe.base,
        "experts": dict(recipe.experts),
        "dtype": recipe.dtype,
        **matrices,
        "groups": {group: list(tensors) for group, tensors in recipe.groups.items()},
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=120))


def _grouping(section: RecipeSection) -> Any:
    words = ("model", "layer", "module", "tensor")
    if isinstance(section.groups, str) and section.groups not in words:
        raise CampaignError(f"groups: expected {', '.join(words)} or a mapping, found {section.groups!r}")
    return section.groups


def _matrix(spec: ParameterSpec, given: Any, experts: list[str], groups: Groups) -> Floats:
    """Return the (K, G) numbers of what the file says: a number, or by expert a number or numbers by group."""
    if not spec.per_expert:
        return np.array([_row(spec, spec.name, given, groups)])
    if isinstance(given, Mapping):
        if unknown := sorted(str(name) for name in given if name not in experts):
            raise CampaignError(f"{spec.name}.{unknown[0]}: unknown expert{did_you_mean(unknown[0], experts)}")
        if missing := [name for name in experts if name not in given]:
            raise CampaignError(
                f"{spec.name}: no number for expert {missing[0]}; give every expert one (0 leaves it out)"
            )
        return np.array([_row(spec, f"{spec.name}.{name}", given[name], groups) for name in experts])
    return np.array([_row(spec, spec.name, given, groups)] * len(experts))


def _row(spec: ParameterSpec, where: str, given: Any, groups: Groups) -> list[float]:
    if isinstance(given, Mapping):
        if unknown := sorted(str(name) for name in given if name not in groups):
            raise CampaignError(f"{where}.{unknown[0]}: unknown group{did_you_mean(unknown[0], groups)}")
        if missing := [group for group in groups if group not in given]:
            raise CampaignError(f"{where}: no number for group {missing[0]}")
        return [number for group in groups for number in _row(spec, f"{where}.{group}", given[group], {group: ()})]
    number = spec.default if given is None else given
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise CampaignError(f"{where}: expected a number, found {number!r}")
    if not spec.minimum <= number <= spec.maximum:
        raise CampaignError(f"{where}: expected a number in [{spec.minimum:g}, {spec.maximum:g}], found {number:g}")
    return [float(number)] * len(groups)


def _number(row: tuple[float, ...], groups: Mapping[str, tuple[str, ...]]) -> Any:
    """One number where all groups agree, else one a group."""
    return row[0] if len(set(row)) == 1 else dict(zip(groups, row, strict=True))
