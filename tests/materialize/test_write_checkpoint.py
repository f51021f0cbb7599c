"""Exporting: what lies on disk is what was merged, or nothing is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from evomerge.errors import EvoMergeError, InputError
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import quiet_transformers
from evomerge.materialize.write import write_checkpoint
from evomerge.operators.linear import TaskArithmetic
from evomerge.records import Recipe

Make = Callable[..., Materializer]
Checkpoints = Callable[[str, str], list[Checkpoint]]


def built(held: Materializer) -> Materializer:
    operator = TaskArithmetic()
    coefficients = np.array([[0.4], [0.3]])
    recipe = Recipe(
        operator=operator.name,
        options={},
        base="base",
        experts={"one": "one", "two": "two"},
        dtype="float32",
        groups={"model": tuple(tensor.name for tensor in held.layout.tensors)},
        values={"coefficient": tuple(map(tuple, coefficients.tolist()))},
    )
    held.build(operator, recipe)
    return held


def nothing(_: Path) -> None:
    """Add no file."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_transformers_loads_the_same_bits(
    materializer: Make, checkpoints: Checkpoints, tmp_path: Path, kind: str, dtype: str
) -> None:
    held = built(materializer(kind, dtype))
    out = tmp_path / "vit" if kind == "vit" else tmp_path / "out"
    returned = write_checkpoint(held, checkpoints(kind, dtype)[0], out, nothing)
    with quiet_transformers():
        loader = AutoModel if kind == "vit" else AutoModelForCausalLM
        loaded, report = loader.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys"))
    assert type(loaded) is type(held.resident.module)
    assert loaded.dtype == getattr(torch, dtype)
    ours, theirs = held.resident.module.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(tiny.outputs(loaded.eval()), tiny.outputs(held.resident.module))
    assert returned == held.weights_hash()


def test_what_was_exported_is_a_checkpoint_of_ours(
    materializer: Make, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It can be the base of the next search, and its hash says that it is the same model."""
    held = built(materializer("tied"))
    returned = write_checkpoint(held, checkpoints("tied", "float32")[0], tmp_path / "out", nothing)
    again = Materializer(open_checkpoint("base", tmp_path / "out"), [], dtype="float32")
    assert list(again.hashes.values()) == [returned]


def test_companions_are_copied_from_the_base_and_nothing_else(materializer: Make, tmp_path: Path) -> None:
    base_folder = tiny.write(tiny.make("llama"), tmp_path / "base")
    companions = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "merges.txt",
        "chat_template.jinja",
    }
    for name in (*companions, "README.md", "training_args.bin", "optimizer.pt"):
        (base_folder / name).write_text(f"this is {name}")
    write_checkpoint(built(materializer("llama")), open_checkpoint("base", base_folder), tmp_path / "out", nothing)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"model.safetensors", "config.json", "generation_config.json", *companions}
    assert all((tmp_path / "out" / name).read_text() == f"this is {name}" for name in companions)


def test_what_add_writes_lies_beside_the_weights(materializer: Make, checkpoints: Checkpoints, tmp_path: Path) -> None:
    seen = []

    def add(folder: Path) -> None:
        seen.extend(path.name for path in folder.iterdir())
        (folder / "README.md").write_text("a card")

    out = tmp_path / "deep" / "er" / "out"
    write_checkpoint(built(materializer("vit")), checkpoints("vit", "float32")[0], out, add)
    assert (out / "README.md").read_text() == "a card"
    assert "model.safetensors" in seen
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_be_there(materializer: Make, checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(built(materializer("vit")), checkpoints("vit", "float32")[0], tmp_path / "out", nothing)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_already_there_is_left_alone(
    materializer: Make, checkpoints: Checkpoints, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    precious = out / "precious.txt" if what == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(InputError, match="new or empty.*another --out"):
        write_checkpoint(built(materializer("vit")), checkpoints("vit", "float32")[0], out, nothing)
    assert precious.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_behind_when_add_fails(materializer: Make, checkpoints: Checkpoints, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(built(materializer("vit")), checkpoints("vit", "float32")[0], tmp_path / "out", add)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_the_written_weights_differ(
    materializer: Make, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """One bit of one weight is enough."""

    def flip(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["layernorm.weight"].view(torch.int32)[3] ^= 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EvoMergeError, match="other tensors"):
        write_checkpoint(built(materializer("vit")), checkpoints("vit", "float32")[0], tmp_path / "out", flip)
    assert not list(tmp_path.iterdir())
