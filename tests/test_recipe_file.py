from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.errors import InputError
from evomerge.export import merge_recipe
from evomerge.families.family import FamilySummary
from evomerge.recipe_file import read_recipe, write_recipe


@pytest.fixture
def sections(small_digits: FamilySummary) -> dict[str, Any]:
    experts = {name: str(small_digits.path / "experts" / name) for name in ("rot90", "parity")}
    return {"base": str(small_digits.path / "base"), "experts": experts}


def write(tmp_path: Path, sections: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
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


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"coeficient": 1.0}, "coeficient: unknown key; did you mean 'coefficient'"),
    ({"coefficient": {"rot90": 1.0}}, "coefficient: no number for expert parity"),
    ({"coefficient": {"rot90": 1.0, "partiy": 1.0}}, "coefficient.partiy: unknown expert; did you mean 'parity'"),
    ({"coefficient": {"rot90": "x", "parity": 1.0}}, "coefficient.rot90: expected a number, found 'x'"),
    ({"coefficient": {"rot90": {"modle": 1.0}, "parity": 1.0}}, "coefficient.rot90.modle: unknown group"),
    ({"groups": "layer", "coefficient": {"rot90": {"before": 1.0}, "parity": 1.0}}, "no number for group layer0"),
    ({"groups": "layers"}, "groups: expected model, layer, module, tensor or a mapping, found 'layers'"),
    ({"operator": {"name": "ties", "density": 0.3}}, "operator.density: a recipe gives parameters beside operator"),
    ({"operator": {"name": "ties"}, "density": 2.0}, "density: expected a number in"),
    ({"operator": {"name": "soup"}}, "operator.name: unknown operator 'soup'"),
    ({"dtype": "int8"}, "dtype"),
    ({"base": "nowhere"}, "base: expected a checkpoint folder"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, sections: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(write(tmp_path, sections | changes))
