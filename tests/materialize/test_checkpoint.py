"""Opening checkpoints: what is right is read, what is wrong is named."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evomerge.errors import CheckpointError
from evomerge.materialize.checkpoint import Checkpoint, fit_to_base, open_checkpoint
from evomerge.materialize.resident import empty_model, load_model, tensor_index, tied_names

Family = Callable[[str, str], list[Path]]


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be damaged."""
    return Path(shutil.copytree(family("llama", "float32")[0], tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.write(tiny.make("llama"), tmp_path / "sharded", max_shard_size="10KB")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_refused(words: list[str], action: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_header_says_what_the_file_holds(family: Family, dtype: str) -> None:
    folder = family("llama", dtype)[0]
    checkpoint = open_checkpoint("base", folder)
    held = load_file(folder / "model.safetensors")
    assert {name: shape for name, (shape, _) in checkpoint.header.items()} == {
        name: tuple(tensor.shape) for name, tensor in held.items()
    }
    assert checkpoint.dtype == dtype
    assert checkpoint.config["model_type"] == "llama"


def test_shards_are_one_checkpoint(sharded: Path, family: Family) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert open_checkpoint("a", sharded).header == open_checkpoint("b", family("llama", "float32")[0]).header


def test_the_model_without_memory_has_the_same_tensors(family: Family) -> None:
    for kind in tiny.KINDS:
        checkpoint = open_checkpoint("base", family(kind, "float32")[0])
        empty = empty_model(checkpoint)
        assert all(parameter.is_meta for parameter in empty.parameters())
        assert tensor_index(empty) == tensor_index(load_model(checkpoint, "float32"))
        assert tied_names(empty) == ({"lm_head.weight"} if kind == "tied" else set())


def test_no_folder_is_named(tmp_path: Path) -> None:
    assert_refused(
        ["expert math", "no folder", "nowhere"], lambda: open_checkpoint("expert math", tmp_path / "nowhere")
    )


def test_a_hub_id_that_cannot_be_had_says_what_to_do() -> None:
    assert_refused(
        ["base", "nobody/no-such-model", "hub", "check the path"],
        lambda: open_checkpoint("base", "nobody/no-such-model"),
    )


def test_a_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert_refused(["base", "config.json", str(folder)], lambda: open_checkpoint("base", folder))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_configuration_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(["base", "config.json"], lambda: open_checkpoint("base", folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(["pytorch_model.bin", "pickled", "safetensors"], lambda: open_checkpoint("base", folder))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_refused(["model.safetensors", "neither"], lambda: open_checkpoint("base", folder))


@pytest.mark.parametrize("kept", [0, 5, 100, 10_000, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(["base", "model.safetensors", "cannot be read"], lambda: open_checkpoint("base", folder))


def test_a_file_cut_by_one_byte_says_so(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused([str(size), str(size - 1), "cut short"], lambda: open_checkpoint("base", folder))


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_outside_its_folder(sharded: Path, place: str) -> None:
    def point_outside(index: dict[str, Any]) -> None:
        index["weight_map"]["lm_head.weight"] = place

    edit_json(sharded / "model.safetensors.index.json", point_outside)
    assert_refused(["base", repr(place), "outside"], lambda: open_checkpoint("base", sharded))


def test_a_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert_refused([gone.name, "cannot be read"], lambda: open_checkpoint("base", sharded))


def test_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    def add_a_ghost(index: dict[str, Any]) -> None:
        index["weight_map"]["ghost.weight"] = index["weight_map"]["lm_head.weight"]

    edit_json(sharded / "model.safetensors.index.json", add_a_ghost)
    assert_refused(["disagree", "1 tensor", "ghost.weight"], lambda: open_checkpoint("base", sharded))


@pytest.mark.parametrize("weight_map", [[], "all.safetensors", {"lm_head.weight": 3}, {"lm_head.weight": None}, None])
def test_an_index_of_another_form(sharded: Path, weight_map: Any) -> None:
    edit_json(sharded / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
    assert_refused(["base", "model.safetensors.index.json"], lambda: open_checkpoint("base", sharded))


json_like = st.recursive(
    st.none() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "__metadata__"]), inner, max_size=2)
    ),
    max_leaves=4,
)
almost_header = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.just("F32") | json_like,
            "shape": st.just([2]) | json_like,
            "data_offsets": st.just([0, 8]) | json_like,
        },
    ),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | (json_like | almost_header).map(lambda header: json.dumps(header).encode()))
def test_whatever_the_file_holds_the_error_is_ours(folder: Path, content: bytes) -> None:
    """A file of random bytes or of a nearly right header is refused, or read if it happens to be right."""
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    with suppress(CheckpointError):
        header = open_checkpoint("base", folder).header
        assert all(isinstance(size, int) for shape, _ in header.values() for size in shape)


class TestSameTensors:
    """An expert must hold what the base holds."""

    @pytest.fixture
    def base(self, family: Family) -> Checkpoint:
        return open_checkpoint("base", family("llama", "float32")[0])

    def expert(self, folder: Path) -> Checkpoint:
        return open_checkpoint("expert math", folder)

    def test_the_same_is_fine(self, base: Checkpoint, folder: Path) -> None:
        fit_to_base(base, self.expert(folder), frozenset(), frozenset())

    def test_a_missing_tensor(self, base: Checkpoint, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
        assert_refused(
            ["expert math", "misses 1 tensor ", "model.norm.weight", "same base"],
            lambda: fit_to_base(base, self.expert(folder), frozenset(), frozenset()),
        )

    def test_extra_tensors(self, base: Checkpoint, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({f"extra{i}.weight": torch.zeros(2) for i in range(4)}))
        assert_refused(
            ["expert math", "adds 4 tensors", "extra0.weight", "..."],
            lambda: fit_to_base(base, self.expert(folder), frozenset(), frozenset()),
        )

    def test_a_differing_shape(self, base: Checkpoint, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(63, 32)}))
        assert_refused(
            ["expert math", "lm_head.weight", "61x32", "63x32", "1 tensor differ", "vocabulary"],
            lambda: fit_to_base(base, self.expert(folder), frozenset(), frozenset()),
        )

    def test_a_tied_tensor_may_be_written_or_not(self, family: Family, tmp_path: Path) -> None:
        base = open_checkpoint("base", family("tied", "float32")[0])
        with_head = Path(shutil.copytree(base.folder, tmp_path / "with_head"))
        rewrite(with_head, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        tied = tied_names(empty_model(base))
        fit_to_base(base, self.expert(with_head), tied, frozenset())
        fit_to_base(self.expert(with_head), base, tied, frozenset())


class TestDtype:
    def test_mixed_dtypes_must_be_decided(self, folder: Path) -> None:
        rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
        checkpoint = open_checkpoint("base", folder)
        assert_refused(["base", "BF16", "F32", "dtype: bfloat16"], lambda: checkpoint.dtype)

    def test_float64_is_not_merged_in(self, folder: Path) -> None:
        rewrite(folder, lambda t: t.update({name: tensor.double() for name, tensor in t.items()}))
        checkpoint = open_checkpoint("base", folder)
        assert_refused(["F64", "dtype: bfloat16"], lambda: checkpoint.dtype)

    def test_whole_numbers_do_not_count(self, folder: Path) -> None:
        rewrite(folder, lambda t: t.update({"position_ids": torch.arange(4)}))
        assert open_checkpoint("base", folder).dtype == "float32"


class TestLoading:
    def load(self, folder: Path) -> Any:
        return load_model(open_checkpoint("base", folder), "float32")

    def test_a_tensor_that_the_model_needs(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
        assert_refused(["base", "missing", "model.norm.weight", "LlamaForCausalLM"], lambda: self.load(folder))

    def test_a_tensor_that_the_model_does_not_have(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({"adapter.weight": torch.zeros(2)}))
        assert_refused(["base", "unexpected", "adapter.weight"], lambda: self.load(folder))

    def test_a_shape_that_the_configuration_does_not_have(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(63, 32)}))
        assert_refused(["base", "lm_head.weight"], lambda: self.load(folder))

    def test_an_architecture_that_transformers_does_not_have(self, folder: Path) -> None:
        edit_json(folder / "config.json", lambda config: config.update(architectures=["FooForCausalLM"]))
        assert_refused(["base", "'FooForCausalLM'", "config.json"], lambda: self.load(folder))
        assert_refused(["base", "'FooForCausalLM'"], lambda: empty_model(open_checkpoint("base", folder)))

    def test_a_model_type_that_transformers_does_not_have(self, folder: Path) -> None:
        edit_json(folder / "config.json", lambda config: config.update(model_type="foo", architectures=["FooModel"]))
        assert_refused(["base", "config.json"], lambda: empty_model(open_checkpoint("base", folder)))

    @pytest.mark.parametrize("config", [{}, {"model_type": "llama", "hidden_size": "wide"}])
    def test_a_configuration_that_makes_no_model(self, folder: Path, config: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
        assert_refused(["base", "config.json"], lambda: empty_model(open_checkpoint("base", folder)))

    def test_a_configuration_without_architectures_loads_the_bare_model(self, folder: Path, family: Family) -> None:
        folder = Path(shutil.copytree(family("vit", "float32")[0], folder.parent / "vit"))
        edit_json(folder / "config.json", lambda config: config.pop("architectures"))
        assert type(self.load(folder)).__name__ == "ViTModel"
