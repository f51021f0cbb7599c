"""Paths through experts' layers: the gains are the scales, and what runs is what is exported, bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.errors import CandidateError, CheckpointError, InputError
from evomerge.materialize.arrangement import Output
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.merge import Merge, Source
from evomerge.materialize.paths import describe, path_depth, path_of
from evomerge.materialize.residence import Place
from evomerge.materialize.resident import quiet_transformers
from evomerge.materialize.write import write_checkpoint
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.passthrough import Passthrough
from evomerge.records import Recipe, TensorInfo
from evomerge.space.data_flow import Path, PathLayer, gains

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 40, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "rms_norm_eps", {**SIZES, "mlp_bias": True, "attention_bias": True}),
    "tied": ("LlamaConfig", "rms_norm_eps", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": (
        "Qwen3Config",
        "rms_norm_eps",
        {
            **SIZES,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("GPT2Config", "layer_norm_epsilon", GPT2),
}
# The leader's first layer comes second; layers of both, one twice, and gains on all of them but one.
PATH = tuple(
    PathLayer(expert, layer, gain) for expert, layer, gain in ((1, 1, 0.7), (0, 0, 1.0), (1, 1, 1.3), (0, 2, 0.4))
)
Make = Callable[..., Materializer]


def random_model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    name, _, options = KINDS[kind]
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**options, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_family(folder: Folder, base: Any, dtype: str) -> list[Folder]:
    models = [base, tiny.tuned(base, seed=1), tiny.tuned(base, seed=2)]
    return [tiny.write(model, folder / name, dtype) for name, model in zip(("base", "one", "two"), models, strict=True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return tmp_path_factory.mktemp("paths")


@pytest.fixture(scope="module")
def make(root: Folder) -> Make:
    """(kind, dtype, layers of the output) -> a fresh materializer of a base and two experts, which are written once.

    through: a merge of them whose layers paths have too: of the output as one more expert.
    """

    def made(
        kind: str, dtype: str = "float32", layers: Any = None, through: Recipe | None = None, **changes: Any
    ) -> Materializer:
        folder = root / "-".join(map(str, (kind, dtype, *changes.values())))
        if not folder.exists():
            write_family(folder, random_model(kind, **changes), dtype)
        base, *experts = [open_checkpoint(name, folder / name) for name in ("base", "one", "two")]
        sources: list[Source] = list(experts)
        if through and layers:
            merge = Merge(name="merge", recipe=through, operator=TaskArithmetic(), base=base, experts=tuple(experts))
            sources.insert(0, merge)
        place = Place(keeps_merge=bool(through and not layers))
        return Materializer(base, sources, dtype=dtype, output=Output(layers=layers), place=place)

    return made


def recipe_of(held: Materializer, path: Path) -> Recipe:
    layers, groups, values = describe(held.layout.tensors, 2, path)
    return Recipe(
        operator="passthrough", options={}, base="b", experts={"one": "1", "two": "2"}, dtype="float32", groups=groups,
        values={name: tuple(map(tuple, matrix.tolist())) for name, matrix in values.items()}, layers=layers,
    )  # fmt: skip


def run(held: Materializer, path: Path) -> Any:
    """The path on the experts' own memory."""
    held.build(Passthrough(), recipe_of(held, path))
    return held.module


def exported(make: Make, held: Materializer, path: Path, **which: Any) -> Materializer:
    """The same path as a model of its own, arranged and scaled by the operator."""
    recipe = recipe_of(held, path)
    out = make(layers=recipe.layers, **which)
    out.build(Passthrough(), recipe)
    return out


def written(tokens: Sequence[int], model: Any) -> list[int]:
    with torch.inference_mode():
        found: list[int] = model.generate(
            input_ids=torch.tensor([tokens]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0].tolist()
    return found


def scaled_inputs(model: Any, scales: Sequence[float]) -> Tensor:
    """Logits of the literal definition: what flows into each layer is scaled, embeddings and residuals included."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    hooks = [
        block.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale, *args[1:]))
        for block, scale in zip(blocks, scales, strict=True)
    ]
    logits = tiny.outputs(model)
    for hook in hooks:
        hook.remove()
    return logits


class TestGains:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gains_are_scales_of_what_layers_read(self, make: Make, kind: str) -> None:
        """With norms that add next to nothing, to the rounding of float32."""
        eps = {KINDS[kind][1]: 1e-12}
        held = make(kind, **eps)
        scales = np.array([0.5, 1.4, 0.8, 1.3])
        path = tuple(replace(step, gain=gain) for step, gain in zip(PATH, gains(scales).tolist(), strict=True))
        plain = tuple(replace(step, gain=1.0) for step in PATH)
        literal = scaled_inputs(run(held, plain), scales.tolist())
        ours = tiny.outputs(run(held, path))
        torch.testing.assert_close(ours, literal, rtol=0, atol=2e-5 * float(literal.abs().max()))
        assert not torch.allclose(ours, tiny.outputs(run(held, plain)), atol=1e-2)

    @pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])  # Qwen norms queries and keys too, which read no stream
    def test_what_norms_add_counts_for_the_square_of_the_scale(self, make: Make, kind: str) -> None:
        """norm(c h; eps) = norm(h; eps / c^2): a stream scaled once by c, with eps c^2, is ours with eps."""
        key, eps, scale = KINDS[kind][1], 1e-3, 0.5
        held = make(kind, **{key: eps})
        path = tuple(replace(step, gain=1 / scale) for step in PATH)
        plain = tuple(replace(step, gain=1.0) for step in PATH)
        ours = tiny.outputs(run(held, path))
        for literal_eps, is_equal in ((eps * scale**2, True), (eps, False)):
            literal = held if literal_eps == eps else make(kind, **{key: literal_eps})
            found = scaled_inputs(run(literal, plain), [scale, 1.0, 1.0, 1.0])
            assert (float((ours - found).norm() / found.norm()) < 1e-5) == is_equal


class TestRunning:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_runs_is_what_is_exported(
        self, make: Make, root: Folder, tmp_path: Folder, kind: str, dtype: str
    ) -> None:
        """Bit for bit: tensors, logits and what is written with a cache of keys and values; also when read back."""
        held = make(kind, dtype)
        model = run(held, PATH)
        logits, text = tiny.outputs(model), written((5, 6, 7), model)
        out = exported(make, held, PATH, kind=kind, dtype=dtype)
        assert held.weights_hash() == out.weights_hash()
        assert torch.equal(logits, tiny.outputs(out.module))
        assert write_checkpoint(out, tmp_path / "out", lambda _: None) == held.weights_hash()
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype)).eval()
        assert torch.equal(logits, tiny.outputs(loaded))
        assert text == written((5, 6, 7), loaded)
        assert loaded.config.num_hidden_layers == 4

    def test_float16_is_rounded_alike(self, make: Make) -> None:
        held = make("llama", "float16")
        run(held, PATH)
        assert held.weights_hash() == exported(make, held, PATH, kind="llama", dtype="float16").weights_hash()

    def test_the_leaders_own_layers_are_the_leader(self, make: Make, root: Folder) -> None:
        held = make("gpt2")
        model = run(held, tuple(PathLayer(0, layer, 1.0) for layer in range(3)))
        one = AutoModelForCausalLM.from_pretrained(root / "gpt2-float32" / "one").eval()
        assert torch.equal(tiny.outputs(model), tiny.outputs(one))

    def test_hidden_states_are_those_of_its_own_layers(self, make: Make) -> None:
        """transformers records them by hooks, which it installs once in a model."""
        held = make("llama")
        for path in (PATH, PATH[:2], PATH):
            models: list[Any] = [run(held, path), exported(make, held, path, kind="llama").module]
            with torch.inference_mode():
                ours, theirs = (
                    model(input_ids=tiny.TOKENS, output_hidden_states=True).hidden_states for model in models
                )
            assert len(ours) == len(theirs) == len(path) + 1
            assert all(map(torch.equal, ours, theirs))

    def test_it_lies_in_memory_that_is_there(self, make: Make) -> None:
        """Tensors are the experts', or where merges are made."""
        held = make("llama")
        model = run(held, PATH)
        homes = [held.out_P, *(expert.buffer_P for expert in held.sources.experts)]
        ranges = [(home.data_ptr(), home.data_ptr() + home.nbytes) for home in homes]
        for parameter in model.parameters():
            assert any(start <= parameter.data_ptr() < stop for start, stop in ranges)

    def test_a_path_with_more_gains_than_room(self, make: Make) -> None:
        held = make("llama")
        path = PATH * 4
        assert torch.equal(tiny.outputs(run(held, path)), tiny.outputs(exported(make, held, path, kind="llama").module))

    def test_paths_and_merges_take_turns(self, make: Make) -> None:
        """A merge after a path is as before it, and so is the path after the merge."""
        held = make("tied")
        merge = Recipe(
            operator="passthrough", options={}, base="b", experts={"one": "1", "two": "2"}, dtype="float32",
            groups={"model": tuple(tensor.name for tensor in held.layout.tensors)},
            values={"coefficient": ((1.0,), (0.0,)), "scale": ((1.0,),)},
        )  # fmt: skip
        operator = Passthrough()
        found = []
        for recipe in (merge, recipe_of(held, PATH), merge, recipe_of(held, PATH[:1]), recipe_of(held, PATH)):
            held.build(operator, recipe)
            found.append((tiny.outputs(held.module), held.weights_hash()))
        for one, other in ((0, 2), (1, 4)):
            assert torch.equal(found[one][0], found[other][0])
            assert found[one][1] == found[other][1]
        assert not torch.equal(found[3][0], found[4][0])

    def test_a_gain_that_overflows_is_the_candidates_failure(self, make: Make) -> None:
        with pytest.raises(CandidateError, match=r"model\.layers\.0\.\S+ times its gain of 1e\+39 is not finite"):
            run(make("llama"), (PathLayer(0, 0, 1e39),))


class TestThroughAMerge:
    """Paths through the layers of a merge, which leads, and of the experts of which it is made."""

    @staticmethod
    def merge(held: Materializer, coefficients: tuple[float, float] = (0.6, 0.3)) -> Recipe:
        return Recipe(
            operator="task_arithmetic", options={}, base="b", experts={"one": "1", "two": "2"}, dtype="float32",
            groups={"model": tuple(tensor.name for tensor in held.layout.tensors)},
            values={"coefficient": tuple((number,) for number in coefficients)},
        )  # fmt: skip

    @staticmethod
    def lay(held: Materializer, merge: Recipe, path: Path) -> Recipe:
        layers, groups, values = describe(held.layout.tensors, 3, path)
        recipe = Recipe(
            operator="passthrough", options={}, base="b", experts={"merged": merge, "one": "1", "two": "2"},
            dtype="float32", groups=groups, layers=layers,
            values={name: tuple(map(tuple, matrix.tolist())) for name, matrix in values.items()},
        )  # fmt: skip
        operator = TaskArithmetic()
        held.build(operator, merge)
        held.build(Passthrough(), recipe)
        return recipe

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_runs_is_what_is_exported(self, make: Make, tmp_path: Folder, kind: str, dtype: str) -> None:
        merge = self.merge(make(kind, dtype))
        held = make(kind, dtype, through=merge)
        path = tuple(replace(step, expert=2 * step.expert) for step in PATH)  # of the merge and of the second expert
        recipe = self.lay(held, merge, path)
        assert path_of(recipe) == path
        logits = tiny.outputs(held.module)
        out = make(kind, dtype, layers=recipe.layers, through=merge)
        out.build(Passthrough(), recipe)
        assert held.weights_hash() == out.weights_hash()
        assert torch.equal(logits, tiny.outputs(out.module))
        assert write_checkpoint(out, tmp_path / "out", lambda _: None) == held.weights_hash()
        assert out.hashes == held.hashes

    def test_its_own_layers_are_the_merge(self, make: Make) -> None:
        """Also after a path that scaled some of them, and after another merge."""
        merge = self.merge(make("tied"))
        held = make("tied", through=merge)
        held.build(TaskArithmetic(), merge)
        logits, digest = tiny.outputs(held.module), held.weights_hash()
        own = tuple(PathLayer(0, layer, 1.0) for layer in range(3))
        for before in (tuple(replace(step, gain=0.7) for step in own), own):
            self.lay(held, self.merge(held, (0.1, 0.9)), before)
            self.lay(held, merge, before)
            self.lay(held, merge, own)
            assert held.weights_hash() == digest
            assert torch.equal(tiny.outputs(held.module), logits)

    def test_checkpoints_that_have_no_paths_are_found_out_at_once(self, tmp_path: Folder) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.Olmo2Config(**SIZES))
        write_family(tmp_path, model.eval(), "float32")
        base, *experts = [open_checkpoint(name, tmp_path / name) for name in ("base", "one", "two")]
        with pytest.raises(CheckpointError, match=r"base: \w+ is not made for paths"):
            Materializer(base, experts, dtype="float32", place=Place(keeps_merge=True))
        with pytest.raises(InputError, match="residence: int8: paths run on the experts' own tensors"):
            Materializer(base, experts, dtype="float32", place=Place(residence="int8", keeps_merge=True))


def test_a_recipe_gives_the_path_back(make: Make) -> None:
    assert path_of(recipe_of(make("qwen3"), PATH)) == PATH


class TestRefusals:
    def refuse(self, tmp_path: Folder, model: Any, match: str, error: type[InputError] = CheckpointError) -> None:
        write_family(tmp_path, model.eval(), "float32")
        base, *experts = [open_checkpoint(name, tmp_path / name) for name in ("base", "one", "two")]
        held = Materializer(base, experts, dtype="float32")
        with pytest.raises(error, match=match):
            run(held, tuple(PathLayer(0, layer, 1.0) for layer in range(path_depth(base, held.layout.tensors))))

    @pytest.mark.parametrize("kind", ["Gemma2Config", "Olmo2Config", "OPTConfig", "OpenAIGPTConfig"])
    def test_norms_behind_the_layers(self, tmp_path: Folder, kind: str) -> None:
        """Before or after the sum; the last of these has no norm before its head either."""
        torch.manual_seed(0)
        post = {"do_layer_norm_before": False, "ffn_dim": 40, "word_embed_proj_dim": 32, "init_std": 0.2}
        options = {
            "Gemma2Config": {**SIZES, "head_dim": 16},
            "OPTConfig": {**SIZES, **post},
            "OpenAIGPTConfig": GPT2,
        }.get(kind, SIZES)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
        self.refuse(tmp_path, model, r"base: \w+ is not made for paths: .* change the logits by \d\d%")

    def test_pictures(self, tmp_path: Folder) -> None:
        self.refuse(tmp_path, tiny.make("vit"), "base: ViTModel is not made for paths: .*found one of pixel_values")

    def test_two_towers(self) -> None:
        checkpoint: Any = type("C", (), {"name": "base"})()
        with pytest.raises(CheckpointError, match=r"expected one tower of layers .*, found decoder, encoder"):
            path_depth(checkpoint, tuple(TensorInfo(f"{t}.layers.0.w", (2,)) for t in ("encoder", "decoder")))
        tensors = tuple(TensorInfo(f"layers.{i}.w", (2 + i,)) for i in range(2))
        with pytest.raises(CheckpointError, match="found layer 1 unlike layer 0"):
            path_depth(checkpoint, tensors)
