"""Building a family once, whole, and only where there is room for it."""

import importlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_families import SMALL

from evomerge.errors import InputError
from evomerge.families.family import FAMILIES, FamilySummary, make
from evomerge.families.recipes import recipe_hash

NAMES = sorted(SMALL)


def binaries(root: Path) -> dict[str, bytes]:
    patterns = ("*.safetensors", "*.jsonl", "tokenizer.json")
    return {p.relative_to(root).as_posix(): p.read_bytes() for pattern in patterns for p in root.rglob(pattern)}


@pytest.mark.parametrize("name", NAMES)
def test_layout(families: dict[str, FamilySummary], name: str) -> None:
    summary = families[name]
    campaign = yaml.safe_load(summary.campaign.read_text())
    checkpoints = [campaign["base"], *campaign["experts"].values()]
    assert list(campaign["experts"]) == list(summary.experts)
    for checkpoint in checkpoints:
        assert (summary.path / checkpoint / "model.safetensors").is_file()
        assert (summary.path / checkpoint / "tokenizer.json").is_file() == (name != "digits")
    suffix = "safetensors" if name == "digits" else "jsonl"
    assert {p.name for p in (summary.path / "data").iterdir()} == {f"{task}.{suffix}" for task in summary.metrics}
    for objective in campaign["objectives"]:
        assert summary.metrics[objective["task"]] == objective["metric"]


@pytest.mark.parametrize("name", NAMES)
def test_family_json_says_what_was_built(families: dict[str, FamilySummary], name: str) -> None:
    summary = families[name]
    description = json.loads((summary.path / "family.json").read_text())
    assert description["hash"] == recipe_hash(name, SMALL[name]) == summary.recipe_hash
    assert description["recipe"]["seed"] == SMALL[name].seed
    assert list(summary.scores) == ["base", *summary.experts, "uniform"]
    assert all(list(scores) == list(summary.metrics) for scores in summary.scores.values())
    assert summary.seconds["total"] == pytest.approx(sum(s for k, s in summary.seconds.items() if k != "total"))


@pytest.mark.parametrize("name", NAMES)
def test_another_process_builds_the_same_bytes(families: dict[str, FamilySummary], elsewhere: Path, name: str) -> None:
    here = binaries(families[name].path)
    assert here
    assert here == binaries(elsewhere / name)


def test_a_killed_build_leaves_nothing_finished(elsewhere: Path) -> None:
    assert not (elsewhere / "killed").exists()
    leftovers = [path for path in elsewhere.iterdir() if path.name not in NAMES]
    assert [path.name.startswith(".killed.building-") for path in leftovers] == [True]
    assert not list(elsewhere.glob(".killed*/family.json"))
    summary = make("orders", elsewhere / "killed", recipe=SMALL["orders"])
    assert not summary.cached
    assert binaries(summary.path) == binaries(elsewhere / "orders")


def test_an_interrupted_build_cleans_up(tmp_path: Path) -> None:
    def interrupt(message: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("orders", tmp_path / "orders", recipe=SMALL["orders"], progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_family_is_not_built_again(
    families: dict[str, FamilySummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = importlib.import_module("evomerge.families.orders")
    monkeypatch.setattr(builder, "build", lambda *args: pytest.fail("built again"))
    again = make("orders", families["orders"].path, recipe=SMALL["orders"], progress=lambda m, f: pytest.fail(m))
    assert again == replace(families["orders"], cached=True)


def test_an_empty_folder_is_room_enough(tmp_path: Path) -> None:
    out = tmp_path / "orders"
    out.mkdir()
    assert not make("orders", out, recipe=SMALL["orders"]).cached
    assert [path.name for path in tmp_path.iterdir()] == ["orders"]


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    for out in (tmp_path, thesis):
        with pytest.raises(
            InputError, match=r"expected .*, found something else; remove it or choose another"
        ) as error:
            make("orders", out, recipe=SMALL["orders"])
        assert str(out) in str(error.value)
        assert "\n" not in str(error.value)
    assert thesis.read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [thesis]


def test_another_recipe_or_family_in_the_folder_is_refused(families: dict[str, FamilySummary]) -> None:
    out = families["digits"].path
    with pytest.raises(InputError, match="found 'digits' built with another recipe"):
        make("digits", out, recipe=replace(SMALL["digits"], seed=1))
    with pytest.raises(InputError, match="found the family 'digits'"):
        make("digits4", out)


def test_other_library_versions_are_named(families: dict[str, FamilySummary], tmp_path: Path) -> None:
    out = tmp_path / "orders"
    shutil.copytree(families["orders"].path, out)
    description = json.loads((out / "family.json").read_text())
    description["libraries"]["torch"] = "1.0"
    (out / "family.json").write_text(json.dumps({**description, "hash": "0"}))
    with pytest.raises(InputError, match="other versions of torch;"):
        make("orders", out, recipe=SMALL["orders"])


def test_a_damaged_family_is_refused(families: dict[str, FamilySummary], tmp_path: Path) -> None:
    out = tmp_path / "orders"
    shutil.copytree(families["orders"].path, out)
    (out / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"without its file base/model.safetensors"):
        make("orders", out, recipe=SMALL["orders"])


def test_an_unknown_name_and_a_recipe_of_another_family_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'orders'"):
        make("order", tmp_path / "out")
    with pytest.raises(InputError, match="expected a DigitsRecipe, got a OrdersRecipe"):
        make("digits", tmp_path / "out", recipe=SMALL["orders"])
    assert list(tmp_path.iterdir()) == []


def test_the_caller_keeps_random_state_and_threads(tmp_path: Path) -> None:
    np.random.seed(3)
    torch_before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    num_threads = torch.get_num_threads()
    for name, recipe in SMALL.items():
        make(name, tmp_path / name, recipe=recipe)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_before, strict=True))
    assert random.getstate() == python_before
    assert torch.get_num_threads() == num_threads


def test_progress_rises_to_one(tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    make("digits", tmp_path / "out", recipe=SMALL["digits"], progress=lambda *report: reports.append(report))
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert reports[-1] == ("done", 1.0)
    assert {"base", "rot90", "parity"} <= {message for message, _ in reports}


def test_recipes_are_part_of_the_hash() -> None:
    hashes = {recipe_hash(name, family.recipe) for name, family in FAMILIES.items()}
    hashes |= {recipe_hash("digits", SMALL["digits"]), recipe_hash("digits", replace(SMALL["digits"], seed=1))}
    assert len(hashes) == len(FAMILIES) + 2


def test_importing_the_names_loads_no_torch() -> None:
    code = "import sys; import evomerge.families.family as f; print(sorted(f.FAMILIES), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['digits',", "'digits4',", "'orders',", "'text']", "False"]
