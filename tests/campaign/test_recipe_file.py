import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from evomerge.campaign.recipe_file import read_recipe, write_recipe
from evomerge.errors import InputError
from evomerge.families.family import FamilySummary
from evomerge.publish.export import merge_recipe


@pytest.fixture
def sections(small_digits: FamilySummary) -> dict[str, Any]:
    experts = {name: str(small_digits.path / "experts" / name) for name in ("rot90", "parity")}
    return {"base": str(small_digits.path / "base"), "experts": experts}


def write(tmp_path: Path, sections: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def quiet(_: str) -> None:
    """Nothing to show."""


def test_a_written_recipe_reads_back_the_same(tmp_path: Path, sections: dict[str, Any]) -> None:
    coefficient = {"rot90": 0.1 + 0.2, "parity": {"before": 1 / 3, "layer0": -0.5, "layer1": 1e-17, "after": 1.0}}
    operator = {"name": "ties", "normalize": False}
    path = write(
        tmp_path, sections | {"groups": "layer", "coefficient": coefficient, "operator": operator, "density": 0.7}
    )
    recipe = read_recipe(path).recipe
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml").recipe == recipe


def test_a_written_recipe_of_one_expert_reads_back_the_same(tmp_path: Path, sections: dict[str, Any]) -> None:
    """A row a parameter, whether it is the expert's or the whole merge's."""
    experts = {"rot90": sections["experts"]["rot90"]}
    given = {"groups": "layer", "coefficient": {"rot90": [0, 1]}, "operator": {"name": "ties"}, "scale": [1, 2]}
    recipe = read_recipe(write(tmp_path, sections | given | {"experts": experts})).recipe
    assert len(set(recipe.values["scale"][0])) > 1
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml").recipe == recipe


def test_names_of_groups_are_no_patterns_when_written(tmp_path: Path, sections: dict[str, Any]) -> None:
    groups = {"a*": "*.0.*", "ab": "*.1.*", "[ab]?": "*"}
    given = {"groups": groups, "coefficient": {"*": {"[[]ab[]]?": 0.3, "ab": 0.2, "a[*]": 0.1}}}
    recipe = read_recipe(write(tmp_path, sections | given)).recipe
    assert dict(zip(recipe.groups, recipe.values["coefficient"][0], strict=True)) == {
        "a*": 0.1,
        "ab": 0.2,
        "[ab]?": 0.3,
    }
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml").recipe == recipe


@pytest.fixture
def nested(sections: dict[str, Any]) -> dict[str, Any]:
    """A merge of a merge and an expert."""
    merge = {
        "operator": {"name": "ties"},
        "experts": dict(sections["experts"]),
        "groups": "layer",
        "coefficient": {"rot90": [0.2, 0.9], "parity": 0.6},
        "density": 0.5,
    }
    experts = {"both": merge, "parity": sections["experts"]["parity"]}
    return sections | {"experts": experts, "coefficient": {"both": 0.7, "parity": 0.2}}


def test_a_merge_among_the_experts_is_made_first(
    tmp_path: Path, sections: dict[str, Any], nested: dict[str, Any]
) -> None:
    """As two recipes would, one after the other; and so it is read back."""
    recipe = read_recipe(write(tmp_path, nested)).recipe
    at_once = merge_recipe(tmp_path / "recipe.yaml", tmp_path / "merged", "cpu", quiet).weights
    assert read_recipe(tmp_path / "merged" / "recipe.yaml").recipe == recipe
    merge_recipe(write(tmp_path, sections | nested["experts"]["both"]), tmp_path / "first", "cpu", quiet)
    experts = nested["experts"] | {"both": str(tmp_path / "first")}
    second = merge_recipe(write(tmp_path, nested | {"experts": experts}), tmp_path / "second", "cpu", quiet)
    assert second.weights == at_once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficient": {"rot90": 1}}, r"experts.both: coefficient: no number for expert parity"),
        ({"base": "elsewhere"}, r"experts.both: base: unknown key"),
        ({"densty": 1}, r"experts.both: densty: unknown key; did you mean 'density'\?"),
        ({"experts": {"rot90": 3}}, r"experts.both: experts.rot90: .*found 3"),
    ],
)
def test_mistakes_in_a_merge_among_the_experts_are_named(
    tmp_path: Path, nested: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    nested["experts"]["both"] |= changes
    with pytest.raises(InputError, match=message):
        read_recipe(write(tmp_path, nested))


def test_numbers_by_pattern_and_over_depth(tmp_path: Path, sections: dict[str, Any]) -> None:
    given = {
        "groups": "module",
        "operator": {"name": "ties"},
        "coefficient": {"rot90": {"*.attn": 0.4, "layer*.mlp": [0, 1], "*": 0.8}, "par*": [0.2, 0.6]},
        "density": {"*": {"before.*": 1, "*": [0.1, 0.2, 0.3]}},
        "scale": {"*.norm": 2, "*": 1},
    }
    recipe = read_recipe(write(tmp_path, sections | given)).recipe
    matrices = {
        name: [dict(zip(recipe.groups, row, strict=True)) for row in rows] for name, rows in recipe.values.items()
    }
    rot90, parity = matrices["coefficient"]
    expected = {"layer0.attn": 0.4, "layer0.mlp": 0.0, "layer1.mlp": 1.0, "layer1.norm": 0.8, "before.embed": 0.8}
    assert {group: rot90[group] for group in expected} == expected
    assert {parity[group] for group in parity if group.startswith(("before", "layer0"))} == {0.2}
    assert {parity[group] for group in parity if group.startswith(("layer1", "after"))} == {0.6}
    for density in matrices["density"]:
        assert (density["before.embed"], density["layer0.mlp"], density["layer1.mlp"]) == (1.0, 0.1, 0.3)
    (scale,) = matrices["scale"]
    assert (scale["layer1.norm"], scale["layer1.mlp"]) == (2.0, 1.0)


def test_merge_is_task_arithmetic_on_the_files(tmp_path: Path, sections: dict[str, Any]) -> None:
    path = write(tmp_path, sections | {"coefficient": {"rot90": 0.4, "parity": -0.2}})
    merge_recipe(path, tmp_path / "out", "cpu", quiet)
    load = lambda folder: load_file(Path(folder) / "model.safetensors")  # noqa: E731
    base, merged = load(sections["base"]), load(tmp_path / "out")
    rot90, parity = (load(folder) for folder in sections["experts"].values())
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        expected = (
            base[name].double() + 0.4 * (rot90[name].double() - base[name]) - 0.2 * (parity[name].double() - base[name])
        )
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7)


def test_defaults_fill_what_is_left_out(tmp_path: Path, sections: dict[str, Any]) -> None:
    recipe = read_recipe(write(tmp_path, sections | {"operator": {"name": "ties"}})).recipe
    assert recipe.values == {"coefficient": ((1.0,), (1.0,)), "density": ((0.2,), (0.2,)), "scale": ((1.0,),)}


def test_paths_are_relative_to_the_file(tmp_path: Path, small_digits: FamilySummary) -> None:
    folder = small_digits.path
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "base", "experts": {"noise": "experts/noise"}, "coefficient": 1.0}))
    merge_recipe(path, tmp_path / "out", "cpu", quiet)
    one, other = (
        load_file(folder / "experts/noise/model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_layers_can_be_arranged_anew(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Three layers out of two: rot90's first, parity's second, rot90's first again; and it reads back the same."""
    layers = [{"experts": {"rot90": [0, 1]}}, {"experts": {"parity": [1, 2]}}, {"experts": {"rot90": [0, 1]}}]
    path = write(tmp_path, sections | {"operator": {"name": "passthrough"}, "layers": layers})
    recipe = read_recipe(path).recipe
    assert recipe.layers == ((None, 0, None), (None, None, 1), (None, 0, None))
    merge_recipe(path, tmp_path / "out", "cpu", quiet)
    assert read_recipe(tmp_path / "out" / "recipe.yaml").recipe == recipe
    rot90, parity, merged = (
        AutoModel.from_pretrained(folder).state_dict() for folder in (*sections["experts"].values(), tmp_path / "out")
    )
    for name, tensor in merged.items():
        match = re.search(r"\.(\d)\.", name)
        expert, layer = [(rot90, 0), (parity, 1), (rot90, 0)][int(match[1])] if match else (rot90, 0)
        expected = expert[name.replace(match[0], f".{layer}.") if match else name]
        assert torch.equal(tensor, expected), name


def test_where_an_expert_is_no_source_its_coefficient_is_zero(tmp_path: Path, sections: dict[str, Any]) -> None:
    layers = [
        {"base": [0, 1], "experts": {"rot90": [0, 1]}},
        {"base": [1, 2], "experts": {"rot90": [1, 2], "parity": [0, 1]}},
    ]
    recipe = read_recipe(write(tmp_path, sections | {"layers": layers, "coefficient": 0.5})).recipe
    for name, number in zip(recipe.groups, recipe.values["coefficient"][1], strict=True):
        assert number == (0.0 if "embed" in name or "layers.0." in name else 0.5), name
    assert recipe.fingerprint(dict.fromkeys((recipe.base, *recipe.experts.values()), "")) != replace(
        recipe, layers=None
    ).fingerprint(dict.fromkeys((recipe.base, *recipe.experts.values()), ""))


def test_the_result_may_be_rounded_to_another_dtype(tmp_path: Path, sections: dict[str, Any]) -> None:
    path = write(tmp_path, sections | {"coefficient": 0.3, "out_dtype": "bfloat16"})
    merge_recipe(path, tmp_path / "out", "cpu", quiet)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    recipe = read_recipe(path).recipe
    assert (recipe.dtype, recipe.out_dtype) == ("float32", "bfloat16")
    assert read_recipe(tmp_path / "out" / "recipe.yaml").recipe == recipe


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"coeficient": 1.0}, "coeficient: unknown key; did you mean 'coefficient'"),
    ({"coefficient": {"rot90": 1.0}}, "coefficient: no number for expert parity"),
    ({"coefficient": {"rot90": 1.0, "partiy": 1.0}}, "coefficient.partiy: unknown expert; did you mean 'parity'"),
    (
        {"coefficient": {"rot90": "x", "parity": 1.0}},
        "coefficient.rot90: expected a number or a list of numbers over depth, found 'x'",
    ),
    ({"coefficient": {"rot90": [], "parity": 1.0}}, r"coefficient.rot90: expected a number or .*found \[\]"),
    ({"coefficient": {"rot90": [0, 1], "parity": 1.0}}, "coefficient.rot90: group 'model' is not at one depth"),
    (
        {"coefficient": {"rot90": 1.0, "*": 0.5, "parity": 0.1}},
        r"coefficient.parity: no expert is left for it: the first",
    ),
    (
        {"groups": "layer", "coefficient": {"*": {"*": 0, "layer0": {"a": 1}}}},
        r"coefficient.\*.layer0: no group is left",
    ),
    (
        {"groups": "layer", "coefficient": {"*": {"layer0": {"a": 1}, "*": 0}}},
        r"coefficient.\*.layer0: expected a number",
    ),
    ({"groups": "layer", "coefficient": {"*": {"layer?": 1.0}}}, r"coefficient.\*: no number for group before"),
    (
        {"operator": {"name": "ties"}, "density": {"*": {"*": [0.1, 2]}}},
        r"density.\*.\*: expected a number in \[0, 1\], found 2",
    ),
    ({"coefficient": {"rot90": {"modle": 1.0}, "parity": 1.0}}, "coefficient.rot90.modle: unknown group"),
    ({"groups": "layer", "coefficient": {"rot90": {"before": 1.0}, "parity": 1.0}}, "no number for group layer0"),
    ({"groups": "layers"}, "groups: expected model, layer, module, tensor or a mapping, found 'layers'"),
    ({"operator": {"name": "ties", "density": 0.3}}, "operator.density: a recipe gives parameters beside operator"),
    ({"operator": {"name": "ties"}, "density": 2.0}, "density: expected a number in"),
    ({"operator": {"name": "soup"}}, "operator.name: unknown operator 'soup'"),
    ({"dtype": "int8"}, "dtype"),
    ({"layers": []}, "layers: "),
    ({"layers": [{"base": [0, 1]}]}, r"layers\[0\]: expected \[first, end\] of at least one expert"),
    (
        {"layers": [{"experts": {"rot90": [0, 2], "parity": [0, 1]}}]},
        r"layers\[0\]: expected .* all of the same length",
    ),
    ({"layers": [{"experts": {"rot9": [0, 2]}}]}, r"layers\[0\].experts.rot9: unknown expert; did you mean 'rot90'"),
    ({"layers": [{"experts": {"rot90": [1, 3]}}]}, "layer 1: expert rot90 has layers 0 to 1, not 2"),
    (
        {"layers": [{"experts": {"rot90": [0, 1]}}], "operator": {"name": "model_stock"}},
        "layers: model_stock merges the same experts everywhere",
    ),
    ({"base": "nowhere"}, "base: expected a checkpoint folder"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, sections: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(write(tmp_path, sections | changes))
