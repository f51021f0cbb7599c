"""LoRA adapters as experts: read as PEFT means them, merged as factors, refused where they are more than that."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file
from tiny_adapters import products, random_factors, write_adapter
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from evomerge.errors import CheckpointError
from evomerge.kernels.sources import Dense, LowRank
from evomerge.materialize.adapter import Adapter, open_expert
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import empty_model
from evomerge.materialize.write import write_checkpoint
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.lora import Lora, LoraOptions
from evomerge.operators.operator import Operator
from evomerge.operators.ties import Ties
from evomerge.records import Recipe

Family = Callable[[str, str], list[Path]]
MODULES = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"],
    "vit": ["embeddings.patch_embeddings.projection", "layers.0.attention.v_proj", "layers.1.mlp.fc1"],
}
SCALING = 1.5  # alpha 3 / rank 2, as tiny_adapters writes it
TASK_ARITHMETIC = TaskArithmetic()


def recipe(
    held: Materializer, operator: Operator, values: Mapping[str, Sequence[float]], num_groups: int = 1
) -> Recipe:
    names = [tensor.name for tensor in held.layout.tensors]
    return Recipe(
        operator=operator.name,
        options=operator.options.model_dump(),
        base="base",
        experts={f"expert{k}": str(k) for k in range(held.sources.num_experts)},
        dtype="float32",
        groups={f"group{g}": tuple(names[g::num_groups]) for g in range(num_groups)},
        values={name: tuple((number,) * num_groups for number in column) for name, column in values.items()},
    )


def build(held: Materializer, coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Merge by task arithmetic; return copies of the merged tensors."""
    held.build(TASK_ARITHMETIC, recipe(held, TASK_ARITHMETIC, {"coefficient": coefficients}))
    return {name: tensor.clone() for name, tensor in held.layout.views(held.out_P).items()}


class Place:
    """A base on disk, its model without weights, and adapters of it."""

    def __init__(self, base: Path, root: Path) -> None:
        self.base = open_checkpoint("base", base)
        self.model = empty_model(self.base)
        self.weights = tiny.load(base, "float32").state_dict()
        self.root = root

    def adapter(self, tensors: Mapping[str, Tensor], **changes: Any) -> Checkpoint | Adapter:
        folder = write_adapter(self.root / f"adapter{len(list(self.root.iterdir()))}", tensors, **changes)
        return open_expert("expert math", folder, self.model)

    def materializer(self, *experts: Checkpoint | Adapter, dtype: str = "float32") -> Materializer:
        return Materializer(self.base, experts, dtype=dtype)


@pytest.fixture
def place(family: Family, tmp_path: Path) -> Callable[..., Place]:
    return lambda kind="llama", dtype="float32": Place(family(kind, dtype)[0], tmp_path)


def assert_only_moved(merged: Mapping[str, Tensor], base: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> None:
    """Of the tensors, those of ``deltas`` are base + delta in float32, and all others the base's."""
    for name, tensor in merged.items():
        if name not in deltas:
            assert torch.equal(tensor, base[name])
            continue
        exact = base[name].double() + deltas[name].double().view(base[name].shape)
        assert ((tensor.double() - exact).abs() <= 2.0**-22 * (1 + exact.abs())).all()
        assert not torch.equal(tensor, base[name])


@pytest.mark.parametrize("kind", ["llama", "vit"])
class TestMerging:
    def test_zero_is_the_base_exactly(self, place: Callable[..., Place], kind: str) -> None:
        at = place(kind)
        held = at.materializer(at.adapter(random_factors(at.model, MODULES[kind])))
        build(held, [0.7])
        merged = build(held, [0.0])
        assert all(torch.equal(merged[name], at.weights[name]) for name in merged)
        assert held.weights_hash() == held.hashes[str(at.base.folder)]

    def test_one_is_what_peft_would_merge_into_the_base(self, place: Callable[..., Place], kind: str) -> None:
        at = place(kind)
        factors = random_factors(at.model, MODULES[kind])
        merged = build(at.materializer(at.adapter(factors)), [1.0])
        deltas = {f"{module}.weight": delta for module, delta in products(factors, SCALING).items()}
        assert deltas.keys() == {f"{module}.weight" for module in MODULES[kind]}
        assert_only_moved(merged, at.weights, deltas)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_model_in_half_precision_is_rounded_once(
        self, place: Callable[..., Place], kind: str, dtype: str
    ) -> None:
        """The exact sum of two adapters and a checkpoint in float64, rounded once; float32 sums may tip a near-tie."""
        at = place(kind, dtype)
        one, two = (random_factors(at.model, MODULES[kind], seed=seed) for seed in (1, 2))
        full = open_checkpoint("full", at.base.folder.parent / "one")
        held = at.materializer(at.adapter(one), full, at.adapter(two), dtype=dtype)
        merged = build(held, [0.7, 0.25, -0.5])
        expert = tiny.load(full.folder, dtype).state_dict()
        away = 0
        for name, tensor in merged.items():
            exact = 0.75 * at_dtype(at.base.folder, dtype)[name].double() + 0.25 * expert[name].double()
            for coefficient, factors in ((0.7, one), (-0.5, two)):
                for module, delta in products(factors, SCALING).items():
                    if name == f"{module}.weight":
                        exact = exact + coefficient * delta.view(exact.shape)
            rounded = exact.to(tensor.dtype)
            step = torch.finfo(tensor.dtype).eps * exact.abs() + 1e-6
            assert ((tensor.double() - exact).abs() <= 0.5 * step + 2.0**-21 * (1 + exact.abs())).all()
            away += int((tensor != rounded).sum())
        assert away <= 1e-3 * sum(tensor.numel() for tensor in merged.values())

    def test_adapters_as_factors_and_as_checkpoints_give_the_same_model(
        self, place: Callable[..., Place], kind: str, tmp_path: Path
    ) -> None:
        at = place(kind)
        factors = random_factors(at.model, MODULES[kind])
        whole = Path(shutil.copytree(at.base.folder, tmp_path / kind / "whole"))
        model = tiny.load(whole, "float32")
        with torch.no_grad():
            for module, delta in products(factors, SCALING).items():
                weight = model.get_submodule(module).weight
                weight.copy_((weight.double() + delta.view(weight.shape)).float())
        tiny.write(model, whole)
        one = build(at.materializer(at.adapter(factors)), [0.6])
        other = build(at.materializer(open_checkpoint("whole", whole)), [0.6])
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=2.0**-21, atol=2.0**-21)

    def test_a_full_expert_beside_an_adapter_is_still_that_expert_exactly(
        self, place: Callable[..., Place], kind: str
    ) -> None:
        at = place(kind)
        full = open_checkpoint("full", at.base.folder.parent / "one")
        held = at.materializer(at.adapter(random_factors(at.model, MODULES[kind])), full)
        build(held, [0.0, 1.0])
        assert held.weights_hash() == held.hashes[str(full.folder)]

    def test_an_export_holds_the_bits_that_were_resident(
        self, place: Callable[..., Place], kind: str, tmp_path: Path
    ) -> None:
        at = place(kind)
        held = at.materializer(at.adapter(random_factors(at.model, MODULES[kind])))
        merged = build(held, [0.8])
        out = tmp_path / kind / "out"
        assert write_checkpoint(held, out, lambda _: None) == held.weights_hash()
        loaded = tiny.load(out, "float32").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())
        assert not (out / "adapter_config.json").exists()


def at_dtype(folder: Path, dtype: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = tiny.load(folder, dtype).state_dict()
    return state


class TestReading:
    """What the two files mean."""

    def deltas(self, at: Place, tensors: Mapping[str, Tensor], **changes: Any) -> dict[str, Tensor]:
        """The task vectors that are read, of the tensors that have one."""
        held = at.materializer(at.adapter(tensors, **changes))
        [expert] = held.sources.experts
        assert isinstance(expert, LowRank)
        return {held.layout.tensors[s].name: held.sources.task_vector(0, s) for s in expert.factors}

    def assert_scaled(self, deltas: Mapping[str, Tensor], factors: Mapping[str, Tensor], scaling: float) -> None:
        for module, delta in products(factors, scaling).items():
            torch.testing.assert_close(deltas[f"{module}.weight"].double(), delta, rtol=1e-5, atol=1e-6)

    def test_the_names_may_hold_the_adapters(self, place: Callable[..., Place]) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors.items()}
        self.assert_scaled(self.deltas(at, named), factors, SCALING)

    def test_rank_stabilized_scaling(self, place: Callable[..., Place]) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        self.assert_scaled(self.deltas(at, factors, use_rslora=True), factors, 3 / 2**0.5)

    def test_patterns_of_ranks_and_alphas(self, place: Callable[..., Place]) -> None:
        """A pattern is what a module's name ends in; the first that fits wins."""
        at = place()
        q, k, down = (
            random_factors(at.model, [module], rank=rank)
            for module, rank in zip(MODULES["llama"], (3, 2, 4), strict=True)
        )
        deltas = self.deltas(
            at,
            {**q, **k, **down},
            rank_pattern={"q_proj": 3, r"layers\.\d+\.mlp.down_proj": 4},
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 6, "proj": 1e9, "self_attn.q_proj": 5},
        )
        self.assert_scaled(deltas, q, 6 / 3)
        self.assert_scaled(deltas, k, 3 / 2)
        self.assert_scaled(deltas, down, 3 / 4)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_factors_in_half_precision_are_read_exactly(self, place: Callable[..., Place], dtype: str) -> None:
        at = place()
        factors = {
            name: tensor.to(getattr(torch, dtype))
            for name, tensor in random_factors(at.model, MODULES["llama"]).items()
        }
        self.assert_scaled(self.deltas(at, factors), factors, SCALING)

    def test_an_embedding(self, place: Callable[..., Place]) -> None:
        """PEFT holds its factors the other way round, and saves the embedding itself beside them."""
        at = place()
        a, b = torch.randn(2, 61), torch.randn(32, 2)
        embedding = "model.embed_tokens"
        saved = {
            f"{embedding}.lora_embedding_A": a,
            f"{embedding}.lora_embedding_B": b,
            f"{embedding}.base_layer.weight": at.weights[f"{embedding}.weight"],
        }
        deltas = self.deltas(at, saved)
        assert deltas.keys() == {f"{embedding}.weight"}
        torch.testing.assert_close(deltas[f"{embedding}.weight"], SCALING * (b @ a).T, rtol=1e-5, atol=1e-5)

    def test_an_embedding_that_was_changed_beside_its_factors(self, place: Callable[..., Place]) -> None:
        at = place()
        embedding = "model.embed_tokens"
        changed = at.weights[f"{embedding}.weight"].clone()
        changed[3] += 1.0
        a, b = torch.randn(2, 61), torch.randn(32, 2)
        saved = {f"{embedding}.lora_embedding_A": a, f"{embedding}.lora_embedding_B": b}
        deltas = self.deltas(at, {**saved, f"{embedding}.base_layer.weight": changed})
        expected = SCALING * (b @ a).T + (changed - at.weights[f"{embedding}.weight"])
        torch.testing.assert_close(deltas[f"{embedding}.weight"], expected, rtol=1e-5, atol=1e-5)

    def test_conv1d_of_gpt2_is_transposed(self, tmp_path: Path) -> None:
        config = GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=16, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        base = tiny.write(GPT2LMHeadModel(config), tmp_path / "gpt2")
        checkpoint = open_checkpoint("base", base)
        a, b = torch.randn(2, 16), torch.randn(48, 2)
        module = "transformer.h.0.attn.c_attn"
        folder = write_adapter(
            tmp_path / "adapter", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, fan_in_fan_out=True
        )
        held = Materializer(checkpoint, [open_expert("x", folder, empty_model(checkpoint))], dtype="float32")
        before, merged = build(held, [0.0]), build(held, [0.5])
        moved = merged[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(moved, 0.5 * SCALING * (b @ a).T, rtol=1e-4, atol=1e-5)

    def test_names_of_an_older_transformers(self, place: Callable[..., Place]) -> None:
        """Its ViT was vit.encoder.layer.0.attention.attention.value; checkpoints on disk are still named so."""
        at = place("vit")
        factors = random_factors(at.model, ["layers.0.attention.v_proj", "layers.1.mlp.fc1"])
        old = {
            "layers.0.attention.v_proj": "encoder.layer.0.attention.attention.value",
            "layers.1.mlp.fc1": "vit.encoder.layer.1.intermediate.dense",
        }
        named = {
            f"{old[name.partition('.lora_')[0]]}.lora_{name.partition('.lora_')[2]}": tensor
            for name, tensor in factors.items()
        }
        self.assert_scaled(self.deltas(at, named), factors, SCALING)

    def test_whole_tensors_become_their_difference_from_the_base(self, place: Callable[..., Place]) -> None:
        """modules_to_save and trained biases; at 1 the merged tensor is the saved one."""
        at = place("vit")
        factors = random_factors(at.model, MODULES["vit"])
        generator = torch.Generator().manual_seed(5)
        whole = {
            name: at.weights[name] + torch.randn(at.weights[name].shape, generator=generator)
            for name in ("layernorm.weight", "layernorm.bias", "pooler.dense.weight", "layers.0.attention.v_proj.bias")
        }
        saved = {name.replace("v_proj.bias", "v_proj.base_layer.bias"): tensor for name, tensor in whole.items()}
        held = at.materializer(at.adapter(factors | saved, bias="lora_only", modules_to_save=["layernorm", "pooler"]))
        merged = build(held, [1.0])
        deltas = {f"{module}.weight": delta for module, delta in products(factors, SCALING).items()}
        assert_only_moved(
            merged, at.weights, deltas | {name: tensor - at.weights[name] for name, tensor in whole.items()}
        )

    def test_a_whole_tensor_beside_another_adapters_factors(self, place: Callable[..., Place]) -> None:
        at = place("vit")
        module = "pooler.dense"
        factors = random_factors(at.model, [module])
        saved = at.weights[f"{module}.weight"] + 1.0
        other = random_factors(at.model, MODULES["vit"]) | {f"{module}.weight": saved}
        held = at.materializer(at.adapter(factors), at.adapter(other, modules_to_save=["dense"]))
        moved = build(held, [0.5, 0.25])[f"{module}.weight"].double() - at.weights[f"{module}.weight"].double()
        expected = 0.5 * products(factors, SCALING)[module] + 0.25
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)

    def test_a_checkpoint_is_still_a_checkpoint(self, place: Callable[..., Place]) -> None:
        at = place()
        assert isinstance(open_expert("full", at.base.folder.parent / "one", at.model), Checkpoint)

    def test_the_memory_of_the_factors(self, place: Callable[..., Place]) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        adapter = at.adapter({name: tensor.bfloat16() for name, tensor in factors.items()})
        assert isinstance(adapter, Adapter)
        assert adapter.size_bytes == 4 * sum(tensor.numel() for tensor in factors.values())


class TestHashes:
    def hash_of(self, at: Place, tensors: Mapping[str, Tensor], **changes: Any) -> str:
        return list(at.materializer(at.adapter(tensors, **changes)).hashes.values())[1]

    def test_they_say_what_is_merged(self, place: Callable[..., Place]) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        changed = {name: tensor.clone() for name, tensor in factors.items()}
        next(iter(changed.values()))[0, 0] += 1e-3
        first = self.hash_of(at, factors)
        assert first == self.hash_of(at, factors, base_model_name_or_path="elsewhere", lora_dropout=0.2)
        renamed = {name.replace("layers.0.self_attn.q", "layers.1.self_attn.q"): t for name, t in factors.items()}
        others = [self.hash_of(at, changed), self.hash_of(at, factors, lora_alpha=4), self.hash_of(at, renamed)]
        assert len({first, *others}) == 4


class TestOperatorsThatReadNoFactors:
    def test_ties_takes_an_adapter_as_its_task_vector(self, place: Callable[..., Place], tmp_path: Path) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        held = at.materializer(at.adapter(factors), open_checkpoint("full", at.base.folder.parent / "one"))
        ties = Ties()
        values = {"coefficient": [1.0, 0.5], "density": [0.3, 0.6], "scale": [1.0]}
        before = build(held, [0.4, 0.3])
        held.build(ties, recipe(held, ties, values))
        merged = {name: tensor.clone() for name, tensor in held.layout.views(held.out_P).items()}
        assert all(isinstance(expert, Dense) for expert in held._sources_of(ties).experts)
        assert isinstance(held.sources.experts[0], LowRank)

        whole = dict(at.weights)
        for module, delta in products(factors, SCALING).items():
            whole[f"{module}.weight"] = (whole[f"{module}.weight"].double() + delta).float()
        folder = Path(shutil.copytree(at.base.folder, tmp_path / "whole"))
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        dense = at.materializer(
            open_checkpoint("whole", folder), open_checkpoint("full", at.base.folder.parent / "one")
        )
        dense.build(ties, recipe(dense, ties, values))
        away = sum(
            int(((merged[name] - tensor).abs() > 1e-5).sum())
            for name, tensor in dense.layout.views(dense.out_P).items()
        )
        # The sum with the base rounds the task vector: an entry at the threshold may fall otherwise.
        assert away <= 5
        again = build(held, [0.4, 0.3])
        assert all(torch.equal(before[name], again[name]) for name in before)

    def test_it_is_held_in_the_models_dtype_and_once(self, place: Callable[..., Place]) -> None:
        at = place("llama", "bfloat16")
        held = at.materializer(at.adapter(random_factors(at.model, MODULES["llama"])), dtype="bfloat16")
        dense = held._sources_of(Ties())
        [expert] = dense.experts
        assert isinstance(expert, Dense)
        assert expert.is_task_vector
        assert expert.buffer_P.dtype == torch.bfloat16
        assert held._sources_of(Ties()) is dense
        for s in range(dense.num_tensors):
            exact = held.sources.task_vector(0, s)
            assert torch.equal(dense.task_vector(0, s), exact.bfloat16().float())

    def test_lora_combines_adapters_in_place(self, place: Callable[..., Place]) -> None:
        at = place()
        one, two = (random_factors(at.model, MODULES["llama"], seed=seed) for seed in (1, 2))
        held = at.materializer(at.adapter(one), at.adapter(two))
        lora = Lora(LoraOptions(combination="svd", svd_rank=4))  # all ranks: nothing is cut off
        held.build(lora, recipe(held, lora, {"coefficient": [0.4, -0.3]}))
        merged = {name: tensor.clone() for name, tensor in held.layout.views(held.out_P).items()}
        exact = build(held, [0.4, -0.3])
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, exact[name], rtol=0, atol=1e-6)


class TestGradient:
    def test_of_a_linear_loss_equals_finite_differences(self, place: Callable[..., Place]) -> None:
        """A random direction of the weights, summed in float64; an adapter, a checkpoint and another adapter."""
        at = place("vit")
        one, two = (random_factors(at.model, MODULES["vit"], seed=seed) for seed in (1, 2))
        bias = {"layers.0.attention.v_proj.bias": at.weights["layers.0.attention.v_proj.bias"] + 0.5}
        full = open_checkpoint("full", at.base.folder.parent / "one")
        held = at.materializer(at.adapter(one | bias, bias="all"), full, at.adapter(two))
        module: nn.Module = held.resident.module
        generator = torch.Generator().manual_seed(0)
        direction = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            for name, tensor in module.named_parameters()
        }

        def loss() -> Tensor:
            return torch.stack(
                [(tensor.double() * direction[name]).sum() for name, tensor in module.named_parameters()]
            ).sum()

        def loss_at(coefficients: Sequence[float]) -> float:
            build(held, coefficients)
            with torch.no_grad():
                return float(loss())

        at_point = np.array([0.4, 0.2, -0.3])
        [(_, gradients)] = held.gradients(
            TASK_ARITHMETIC, recipe(held, TASK_ARITHMETIC, {"coefficient": at_point.tolist()}), [loss]
        )
        ours = gradients["coefficient"][:, 0]
        steps = 0.01 * np.eye(3)
        slopes = [(loss_at((at_point + step).tolist()) - loss_at((at_point - step).tolist())) / 0.02 for step in steps]
        np.testing.assert_allclose(ours, slopes, rtol=0, atol=1e-3 * np.abs(slopes).max())
        assert np.abs(slopes).min() > 0.1


def assert_refused(words: Sequence[str], action: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert message.startswith("expert math: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"peft_type": "IA3"}, ["peft_type", "expected LORA", "'IA3'"]),
            ({"peft_type": None}, ["peft_type", "expected LORA", "None"]),
            ({"use_dora": True}, ["use_dora: True", "more than base + B A", "merge_and_unload"]),
            ({"lora_bias": True}, ["lora_bias: True"]),
            ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication: [[0, 2], [1, 2]]"]),
            ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
            ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters"]),
            ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
            ({"use_qalora": True}, ["use_qalora"]),
            ({"some_future_kind": {"strength": 2}}, ["some_future_kind"]),
            ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights: pissa_niter_4", "changed", "convert"]),
            ({"init_lora_weights": "loftq"}, ["init_lora_weights: loftq"]),
            ({"r": None}, ["r: expected a number other than 0, found None"]),
            ({"lora_alpha": "16"}, ["lora_alpha: expected a number", "'16'"]),
            ({"lora_alpha": float("nan")}, ["lora_alpha", "nan"]),
            ({"rank_pattern": ["q_proj"]}, ["rank_pattern: expected a mapping"]),
            ({"rank_pattern": {"q_proj": "8"}}, ["rank_pattern.q_proj", "'8'"]),
            ({"alpha_pattern": {"q_proj(": 8}}, ["alpha_pattern.q_proj("]),
            ({"r": 4}, ["model.layers.0.self_attn.k_proj", "expected rank 4", "(2, 32)"]),
        ],
    )
    def test_a_configuration(self, place: Callable[..., Place], changes: dict[str, Any], words: Sequence[str]) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        assert_refused(words, lambda: at.adapter(factors, **changes))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: t.clear(), ["no LoRA factors"]),
            (
                lambda t: t.pop("model.layers.0.self_attn.q_proj.lora_B.weight"),
                ["q_proj", "lora_A and lora_B", "A only"],
            ),
            (
                lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 33)}),
                ["model.layers.0.self_attn.q_proj", "(32, 32)", "(2, 33)", "same base"],
            ),
            (
                lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32)}),
                ["q_proj", "B (32,)"],
            ),
            (
                lambda t: t.update({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}),
                ["model.layers.7.mlp.up_proj.lora_A.weight", "the base has no", "same architecture"],
            ),
            (
                lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}),
                ["lora_magnitude_vector", "the base has no"],
            ),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(31)}),
                ["model.norm.weight", "(32,)", "(31,)"],
            ),
            (
                lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.second.weight": torch.ones(2, 32)}),
                ["lora_A.second.weight", "two adapters"],
            ),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}),
                ["model.norm.weight is I64", "F32, BF16, F16"],
            ),
        ],
    )
    def test_tensors(
        self, place: Callable[..., Place], change: Callable[[dict[str, Tensor]], Any], words: Sequence[str]
    ) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        change(factors)
        assert_refused(words, lambda: at.adapter(factors))

    @pytest.mark.parametrize("tensor", ["model.embed_tokens.lora_embedding", "lm_head.lora"])
    def test_a_tied_tensor(self, place: Callable[..., Place], tensor: str) -> None:
        """PEFT changes one of the two; merged weights would change both."""
        at = place("tied")
        ending = "" if "embedding" in tensor else ".weight"
        factors = {f"{tensor}_A{ending}": torch.ones(2, 61), f"{tensor}_B{ending}": torch.ones(32, 2)}
        assert_refused([tensor, "tied", "tie_word_embeddings: false"], lambda: at.adapter(factors))

    @pytest.mark.parametrize("flaw", [float("nan"), float("inf")])
    def test_a_tensor_that_is_not_finite(self, place: Callable[..., Place], flaw: float) -> None:
        at = place()
        factors = random_factors(at.model, MODULES["llama"])
        factors["model.layers.0.self_attn.k_proj.lora_B.weight"][3, 1] = flaw
        adapter = at.adapter(factors)
        assert_refused(
            ["model.layers.0.self_attn.k_proj.lora_B.weight holds a NaN or an infinity"],
            lambda: at.materializer(adapter),
        )

    def test_pickled_weights(self, place: Callable[..., Place]) -> None:
        at = place()
        folder = write_adapter(at.root / "pickled", random_factors(at.model, MODULES["llama"]))
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        assert_refused(
            ["adapter_model.safetensors", "adapter_model.bin", "pickled"],
            lambda: open_expert("expert math", folder, at.model),
        )

    def test_a_truncated_file(self, place: Callable[..., Place]) -> None:
        at = place()
        folder = write_adapter(at.root / "short", random_factors(at.model, MODULES["llama"]))
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert_refused(["cut short"], lambda: open_expert("expert math", folder, at.model))

    def test_a_folder_that_is_both(self, place: Callable[..., Place]) -> None:
        at = place()
        folder = write_adapter(at.root / "both", random_factors(at.model, MODULES["llama"]))
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(at.base.folder / name, folder / name)
        assert_refused(["checkpoint and an adapter"], lambda: open_expert("expert math", folder, at.model))

    def test_an_adapter_as_the_base(self, place: Callable[..., Place]) -> None:
        at = place()
        folder = write_adapter(at.root / "base", random_factors(at.model, MODULES["llama"]))
        with pytest.raises(CheckpointError, match="base: .* holds an adapter; expected a checkpoint"):
            open_checkpoint("base", folder)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_configuration_that_is_no_json_object(self, place: Callable[..., Place], text: str) -> None:
        at = place()
        folder = write_adapter(at.root / "odd", random_factors(at.model, MODULES["llama"]))
        (folder / "adapter_config.json").write_text(text)
        assert_refused(["adapter_config.json"], lambda: open_expert("expert math", folder, at.model))
