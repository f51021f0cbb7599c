"""Exporting: what lies on disk is what was merged, or nothing is."""

import json
import signal
import subprocess
import sys
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
from evomerge.materialize.write import new_folder, require_size, write_checkpoint
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
def test_transformers_loads_the_same_bits(materializer: Make, tmp_path: Path, kind: str, dtype: str) -> None:
    held = built(materializer(kind, dtype))
    out = tmp_path / "vit" if kind == "vit" else tmp_path / "out"
    returned = write_checkpoint(held, out, nothing)
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


def test_what_was_exported_is_a_checkpoint_of_ours(materializer: Make, tmp_path: Path) -> None:
    """It can be the base of the next search, and its hash says that it is the same model."""
    held = built(materializer("tied"))
    returned = write_checkpoint(held, tmp_path / "out", nothing)
    again = Materializer(open_checkpoint("base", tmp_path / "out"), [], dtype="float32")
    assert list(again.hashes.values()) == [returned]


def test_what_add_writes_lies_beside_the_weights(materializer: Make, tmp_path: Path) -> None:
    seen = []

    def add(folder: Path) -> None:
        seen.extend(path.name for path in folder.iterdir())
        (folder / "README.md").write_text("a card")

    out = tmp_path / "deep" / "er" / "out"
    write_checkpoint(built(materializer("vit")), out, add)
    assert (out / "README.md").read_text() == "a card"
    assert "model.safetensors" in seen
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_shards_are_no_larger_than_asked_and_load_as_one_model(materializer: Make, tmp_path: Path) -> None:
    held = built(materializer("llama"))
    expected = {name: tensor.clone() for name, tensor in held.resident.module.state_dict().items()}
    returned = write_checkpoint(held, tmp_path / "out", nothing, shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path for path in (tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))
    ]
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert returned == Materializer(open_checkpoint("out", tmp_path / "out"), [], dtype="float32").weights_hash()


def test_whoever_may_read_the_folder_may_read_its_files(materializer: Make, tmp_path: Path) -> None:
    write_checkpoint(built(materializer("vit")), tmp_path / "out", nothing)
    wanted = (tmp_path / "out").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {wanted}


def test_base_and_experts_are_given_up_before_reading_back(materializer: Make, tmp_path: Path) -> None:
    held = built(materializer("llama"))
    write_checkpoint(held, tmp_path / "out", nothing)
    assert not held.sources.experts
    assert not len(held.base_P)
    tiny.outputs(held.module)


@pytest.mark.parametrize("size", ["5", "GB", "0MB", "5GiB", "-1MB", "1.5GB"])
def test_a_size_that_is_none_is_a_users_mistake(size: str) -> None:
    with pytest.raises(InputError, match="--shard-size: expected a size such as 5GB or 500MB, found"):
        require_size(size)
    assert require_size("1500MB") == "1500MB"


def test_an_empty_folder_may_be_there(materializer: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(built(materializer("vit")), tmp_path / "out", nothing)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_already_there_is_left_alone(materializer: Make, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    precious = out / "precious.txt" if what == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(InputError, match="new or empty.*another --out"):
        write_checkpoint(built(materializer("vit")), out, nothing)
    assert precious.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_behind_when_add_fails(materializer: Make, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(built(materializer("vit")), tmp_path / "out", add)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_the_written_weights_differ(materializer: Make, tmp_path: Path) -> None:
    """One bit of one weight is enough."""

    def flip(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["layernorm.weight"].view(torch.int32)[3] ^= 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EvoMergeError, match="other tensors"):
        write_checkpoint(built(materializer("vit")), tmp_path / "out", flip)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_replaced(materializer: Make, tmp_path: Path) -> None:
    """The process ends in the midst of writing, by the signal that none can catch."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from evomerge.materialize.write import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'stale.bin').write_bytes(bytes(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", program, str(out)], check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name for path in tmp_path.rglob("stale.bin")] == ["stale.bin"]
    write_checkpoint(built(materializer("vit")), out, nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "stale.bin").exists()


def test_two_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "mine.txt").write_text("first")
        with pytest.raises(InputError, match="another process is writing it"), new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "mine.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
