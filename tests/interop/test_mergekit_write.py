"""A recipe as mergekit YAML: read back, every tensor has the same numbers; what mergekit cannot say is told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.campaign.recipe_file import ReadRecipe, read_recipe
from evomerge.interop.document import evaluate
from evomerge.interop.read import read_mergekit
from evomerge.interop.write import mergekit_data, write_mergekit

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = sorted(path.stem for path in (GOLDEN / "configs").glob("*.yaml"))
BASE, V1, V2 = (f"inputs/{name}" for name in ("base", "v1", "v2"))
Write = Callable[..., Path]


def by_tensor(read: ReadRecipe) -> dict[str, dict[str, tuple[float, ...]]]:
    """Tensor -> parameter -> numbers."""
    recipe = read.recipe
    return {
        name: {parameter: tuple(row[g] for row in matrix) for parameter, matrix in recipe.values.items()}
        for g, names in enumerate(recipe.groups.values())
        for name in names
    }


def written(read: ReadRecipe, folder: Path) -> ReadRecipe:
    reason = write_mergekit(read.recipe, (read.base, *read.experts), folder / "again.yaml")
    assert reason is None
    return read_mergekit(folder / "again.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_mergekit_wrote_comes_back_the_same(folder: Path, name: str) -> None:
    path = folder / f"{name}.yaml"
    path.write_text((GOLDEN / "configs" / f"{name}.yaml").read_text())
    read = read_mergekit(path)
    again = written(read, folder)
    # Checkpoints in float32 are read the same in mergekit's dtype float32 and out_dtype bfloat16 as in ours.
    assert again.recipe == read.recipe


RECIPES: list[dict[str, Any]] = [
    {"coefficient": {"v1": 0.3, "v2": 0.7}},
    {"groups": "layer", "coefficient": {"v1": {"before": 0.1, "layer[01]": 0.2, "layer*": 1 / 3, "after": 0.5}, "v2": 0}},
    {"groups": "module", "coefficient": {"v1": {"*.attn": 0.1, "*.mlp": 0.2, "*": 0.5}, "v2": {"layer2.*": 0.3, "*": 0.4}}},
    {"groups": {"head": ["lm_head.*", "*embed*"], "rest": "*"}, "coefficient": {"*": {"head": -0.1, "rest": 1.0}}},
    {"operator": {"name": "ties", "normalize": False}, "coefficient": 1.0, "density": {"v1": 0.3, "v2": 0.8}, "scale": 1.7},
    {"operator": {"name": "linear", "normalize": False}, "coefficient": {"v1": 0.3, "v2": 0.7}},
    {"operator": {"name": "nuslerp", "vectors": "rows"}, "coefficient": {"v1": 0.3, "v2": 0.7}},
    {"operator": {"name": "sce", "floor": 1e-6}, "groups": "layer", "select_topk": {"layer1": 0.5, "*": 0.25}},
    {"dtype": "bfloat16", "coefficient": {"v1": 0.3, "v2": 0.7}},
    {"out_dtype": "float16", "coefficient": {"v1": 0.3, "v2": 0.7}},
    {
        "operator": {"name": "passthrough"},
        "layers": [{"experts": {"v1": [0, 3]}}, {"experts": {"v2": [1, 4]}}, {"experts": {"v1": [3, 4]}}],
        "scale": 1.5,
    },
    {
        "layers": [{"base": [1, 3], "experts": {"v1": [1, 3], "v2": [2, 4]}}, {"base": [0, 1], "experts": {"v2": [0, 1]}}],
        "groups": "module",
        "coefficient": {"v1": {"layer0.*": 0.25, "*.attn": 0.125, "*": 0.5}, "v2": 0.75},
    },
    {"operator": {"name": "passthrough"}, "groups": "layer", "coefficient": {"v1": {"layer[12]": 0, "*": 1}, "v2": 0.5}},
]  # fmt: skip


@pytest.mark.parametrize("sections", RECIPES, ids=[yaml.safe_dump(recipe)[:60] for recipe in RECIPES])
def test_a_recipe_of_ours_reads_back_to_the_same_numbers(write: Write, folder: Path, sections: dict[str, Any]) -> None:
    ours = read_recipe(write({"base": BASE, "experts": {"v1": V1, "v2": V2}, **sections}, "ours.yaml"))
    theirs = written(ours, folder)
    numbers, again = by_tensor(ours), by_tensor(theirs)
    assert numbers.keys() == again.keys()
    if ours.operator.name == "passthrough":  # the preferences become a choice
        for held in (numbers, again):
            for name, parameters in held.items():
                held[name] = {**parameters, "coefficient": (float(np.argmax(parameters["coefficient"])),)}
    assert numbers == again
    assert theirs.recipe.layers == ours.recipe.layers
    assert theirs.recipe.experts == ours.recipe.experts
    for field in ("operator", "options", "dtype", "out_dtype"):
        assert getattr(theirs.recipe, field) == getattr(ours.recipe, field)
    if ours.operator.name not in ("linear", "passthrough"):
        assert theirs.recipe.base == ours.recipe.base


def test_it_is_written_as_a_person_would(write: Write) -> None:
    """Equal numbers share a filter, and what mergekit takes by itself is left out."""
    sections = {"groups": "layer", "coefficient": {"v1": {"layer2": 0.4, "*": 0.1}, "v2": 0.3}}
    ours = read_recipe(write({"base": BASE, "experts": {"v1": V1, "v2": V2}, **sections}, "ours.yaml"))
    data = mergekit_data(ours.recipe, (ours.base, *ours.experts))
    filters = [{"filter": "model.layers.2.", "value": 0.4}, {"value": 0.1}]
    assert data == {
        "merge_method": "task_arithmetic",
        "base_model": ours.recipe.base,
        "models": [
            {"model": ours.recipe.experts["v1"], "parameters": {"weight": filters}},
            {"model": ours.recipe.experts["v2"], "parameters": {"weight": 0.3}},
        ],
        "dtype": "float32",
    }


def test_a_bfloat16_merge_of_bfloat16_checkpoints_is_computed_in_float32(write: Write) -> None:
    """As we do it: loading bfloat16 as float32 loses nothing, and the result is rounded once."""
    ours = read_recipe(
        write({"base": BASE, "experts": {"v1": V1}, "coefficient": 0.3, "dtype": "bfloat16"}, "ours.yaml")
    )
    data = mergekit_data(ours.recipe, (ours.base, *ours.experts))
    assert (data["dtype"], data.get("out_dtype")) == ("bfloat16", None), "float32 checkpoints are rounded first"
    stored = replace(ours.base, header={name: (shape, "BF16") for name, (shape, _) in ours.base.header.items()})
    data = mergekit_data(ours.recipe, (stored, *ours.experts))
    assert (data["dtype"], data["out_dtype"]) == ("float32", "bfloat16")


INEXPRESSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"operator": {"name": "widen"}}, "mergekit has no merge method widen"),
    ({"int8": True, "coefficient": 1.0}, "its task vectors are rounded to 8 bits"),
    ({"operator": {"name": "ties", "election": "count"}}, "mergekit's ties cannot be set to"),
    ({"operator": {"name": "karcher"}, "coefficient": {"v1": 1.0, "v2": 0.5}}, "mergekit's karcher has no coefficient"),
    (
        {"operator": {"name": "passthrough"}, "groups": "module", "coefficient": {"v1": {"*.attn": 1, "*": 0}, "v2": 0.5}},
        "tensors of one layer are taken from several experts",
    ),
    (
        {"operator": {"name": "passthrough"}, "groups": "layer", "coefficient": {"v1": {"before": 1, "*": 0}, "v2": 0.5}},
        "embeddings or head are taken from another expert than the layers beside them",
    ),
    ({"layers": [{"experts": {"v1": [0, 2]}}], "coefficient": 1.0}, "the base is no source of some layers"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "reason"), INEXPRESSIBLE, ids=[reason for _, reason in INEXPRESSIBLE])
def test_what_mergekit_cannot_express_is_said(
    write: Write, tmp_path: Path, sections: dict[str, Any], reason: str
) -> None:
    ours = read_recipe(write({"base": BASE, "experts": {"v1": V1, "v2": V2}, **sections}, "ours.yaml"))
    said = write_mergekit(ours.recipe, (ours.base, *ours.experts), tmp_path / "mergekit.yaml")
    assert said is not None
    assert reason in said
    assert not list(tmp_path.iterdir())


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filters_tell_any_tensors_apart(write: Write, data: st.DataObject) -> None:
    """Numbers at random over groups, few of them, so that they repeat in odd patterns."""
    ours = read_recipe(
        write({"base": BASE, "experts": {"v1": V1}, "groups": "tensor", "coefficient": 1.0}, "ours.yaml")
    )
    names = list(ours.recipe.groups)
    drawn = data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=len(names), max_size=len(names)))
    recipe = replace(ours.recipe, values={"coefficient": (tuple(drawn),)})
    [model] = mergekit_data(recipe, (ours.base, *ours.experts))["models"]
    weight = model["parameters"]["weight"]
    assert [evaluate(weight, name, 0.0) for name in names] == drawn
