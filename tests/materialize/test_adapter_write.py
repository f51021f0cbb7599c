"""A merge of adapters as an adapter: with the base it gives the merged model, bit for bit, or it is refused."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import products, random_factors, write_adapter

from evomerge.errors import EvoMergeError, InputError
from evomerge.materialize import adapter_write
from evomerge.materialize.adapter import open_expert
from evomerge.materialize.adapter_write import merged_adapter, why_no_adapter
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import empty_model
from evomerge.operators.linear import Linear, LinearOptions, TaskArithmetic
from evomerge.operators.lora import Lora, LoraOptions
from evomerge.operators.operator import Operator
from evomerge.operators.ties import Ties
from evomerge.records import Recipe

Family = Callable[[str, str], list[Path]]
MODULES = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
    "vit": ["embeddings.patch_embeddings.projection", "layers.0.attention.v_proj", "layers.1.mlp.fc1"],
}
RANKS = (2, 3)


def nothing(_: Path) -> None:
    """Add no file."""


class Merge:
    """Two adapters of a tiny base, one without the last module and of another rank, merged by an operator."""

    def __init__(
        self, base: Path, root: Path, operator: Operator, *, kind: str = "llama", ranks: Sequence[int] = RANKS
    ):
        self.base = open_checkpoint("base", base)
        model = empty_model(self.base)
        self.factors = [
            random_factors(model, modules, rank=rank, seed=rank)
            for modules, rank in ((MODULES[kind], ranks[0]), (MODULES[kind][:2], ranks[1]))
        ]
        folders = [
            write_adapter(root / f"adapter{k}", factors, r=rank)
            for k, (factors, rank) in enumerate(zip(self.factors, ranks, strict=True))
        ]
        self.held = Materializer(self.base, [open_expert(f.name, f, model) for f in folders], dtype="float32")
        self.operator, names = operator, [tensor.name for tensor in self.held.layout.tensors]
        self.recipe = Recipe(
            operator=operator.name,
            options=operator.options.model_dump(),
            base="base",
            experts={f.name: str(f) for f in folders},
            dtype="float32",
            groups={"even": tuple(names[::2]), "odd": tuple(names[1::2])},
            values={"coefficient": ((0.7, 0.4), (-0.3, 0.9))},
        )
        self.held.build(operator, self.recipe)

    def write(self, out: Path, add: Callable[[Path], None] = nothing) -> str:
        merged = merged_adapter(self.held, self.operator, self.recipe)
        return adapter_write.write_adapter(self.held, merged, self.base, out, add)


OPERATORS: Mapping[str, Operator] = {
    "task_arithmetic": TaskArithmetic(),
    "linear": Linear(),
    "lora svd": Lora(LoraOptions(combination="svd", svd_rank=2)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", OPERATORS)
def test_base_and_written_adapter_are_the_merged_model_bit_for_bit(
    family: Family, tmp_path: Path, name: str, kind: str
) -> None:
    merge = Merge(family(kind, "float32")[0], tmp_path, OPERATORS[name], kind=kind)
    expected = merge.held.weights_hash()
    assert merge.write(tmp_path / "out") == expected  # it has compared what it read back
    with_adapter = adapter_write.adapted(merge.base, tmp_path / "out", "float32", adapter_write.Place())
    assert with_adapter.weights_hash() == expected != with_adapter.hashes[str(merge.base.folder)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
def test_the_rank_is_the_sum_of_ranks_and_the_product_the_weighted_sum(
    family: Family, tmp_path: Path, ranks: Sequence[int]
) -> None:
    merge = Merge(family("llama", "float32")[0], tmp_path, TaskArithmetic(), ranks=ranks)
    merge.write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    *both, alone = MODULES["llama"]
    assert config["r"] == config["lora_alpha"] == sum(ranks)
    assert config["rank_pattern"] == config["alpha_pattern"] == {alone: ranks[0]}
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(MODULES["llama"])  # layer 0 has a down_proj that has no factors
    assert config["base_model_name_or_path"] == str(merge.base.folder)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = products({name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, 1.0)
    groups = [set(members) for members in merge.recipe.groups.values()]
    parts = [products(of, 3 / rank) for of, rank in zip(merge.factors, ranks, strict=True)]  # alpha is 3
    assert found.keys() == {*both, alone}
    for module, product in found.items():
        g = next(g for g, members in enumerate(groups) if f"{module}.weight" in members)
        exact = sum(
            merge.recipe.values["coefficient"][k][g] * part[module] for k, part in enumerate(parts) if module in part
        )
        torch.testing.assert_close(product, exact, rtol=1e-6, atol=1e-6)


def test_modules_are_named_as_people_do_where_that_means_no_other(family: Family, tmp_path: Path) -> None:
    base = family("llama", "float32")[0]
    model = empty_model(open_checkpoint("base", base))
    everywhere = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    assert adapter_write._targets(model, everywhere) == ["q_proj", "v_proj"]
    assert adapter_write._targets(model, everywhere[:3]) == sorted(everywhere[:3])


def test_an_adapter_that_reads_back_otherwise_is_not_left_there(family: Family, tmp_path: Path) -> None:
    merge = Merge(family("llama", "float32")[0], tmp_path, TaskArithmetic())

    def flip(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(torch.int32)[0, 0] ^= 1 << 20
        save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(EvoMergeError, match="the base with the written adapter holds other tensors"):
        merge.write(tmp_path / "out", flip)
    assert not (tmp_path / "out").exists()


class TestRefusals:
    def test_what_is_seen_before_anything_is_loaded(self, family: Family, tmp_path: Path) -> None:
        base, full, _ = family("llama", "float32")
        model = empty_model(open_checkpoint("base", base))
        adapter = open_expert("math", write_adapter(tmp_path / "a", random_factors(model, MODULES["llama"])), model)
        experts: dict[str, Any] = {"math": adapter, "chat": open_checkpoint("chat", full)}
        assert why_no_adapter(TaskArithmetic(), experts) == "expert chat is a full checkpoint; expected adapters only"
        del experts["chat"]
        assert why_no_adapter(TaskArithmetic(), experts) is None
        assert why_no_adapter(Lora(), experts) is None
        assert why_no_adapter(Ties(), experts) == (
            "ties is no weighted sum of adapters; expected task_arithmetic, linear or lora"
        )

    def test_a_base_that_is_multiplied(self, family: Family, tmp_path: Path) -> None:
        merge = Merge(family("llama", "float32")[0], tmp_path, Linear(LinearOptions(normalize=False)))
        with pytest.raises(
            InputError, match="--as-adapter: linear multiplies the base's .* by 0.4, and an adapter only"
        ):
            merge.write(tmp_path / "out")

    def test_a_tensor_that_was_saved_whole(self, family: Family, tmp_path: Path) -> None:
        base: Checkpoint = open_checkpoint("base", family("llama", "float32")[0])
        model = empty_model(base)
        head = 0.5 + tiny.load(base.folder, "float32").state_dict()["lm_head.weight"]
        tensors = random_factors(model, MODULES["llama"]) | {"lm_head.weight": head}
        folder = write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"])
        held = Materializer(base, [open_expert("math", folder, model)], dtype="float32")
        operator = TaskArithmetic()
        names = tuple(tensor.name for tensor in held.layout.tensors)
        recipe = Recipe(
            operator=operator.name, options={}, base="base", experts={"a": str(folder)}, dtype="float32",
            groups={"model": names}, values={"coefficient": ((0.5,),)},
        )  # fmt: skip
        held.build(operator, recipe)
        with pytest.raises(InputError, match="an expert saves lm_head.weight whole"):
            merged_adapter(held, operator, recipe)
