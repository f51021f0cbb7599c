"""Against PEFT itself, where it is installed: what it saves is read, and what it merges and combines comes out.

PEFT is no dependency, not even of the tests (its golden numbers are in tests/golden): pip install peft==0.21.2
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from torch import Tensor, nn

from evomerge.kernels.sources import Sources
from evomerge.materialize.adapter import open_expert
from evomerge.materialize.adapter_write import merged_adapter, write_adapter
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import empty_model
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.lora import Lora, LoraOptions
from evomerge.records import Recipe

if importlib.util.find_spec("peft") is None:
    pytest.skip("PEFT is not installed", allow_module_level=True)

PLAIN: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
CONFIGURATIONS = {
    "plain": ("llama", PLAIN),
    "rslora": ("llama", PLAIN | {"use_rslora": True}),
    "patterns": ("llama", PLAIN | {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"^model.layers.0.*q_proj": 7}}),
    "embedding and head": ("llama", PLAIN | {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "whole head": ("llama", PLAIN | {"modules_to_save": ["lm_head"]}),
    "convolution": ("vit", PLAIN | {"target_modules": ["projection", "v_proj"]}),
    "biases": ("vit", PLAIN | {"target_modules": ["v_proj"], "bias": "lora_only"}),
    "all biases": ("vit", PLAIN | {"target_modules": ["v_proj"], "bias": "all"}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' about each other
        yield


def train(model: nn.Module, seed: int) -> None:
    """Move whatever the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def read(base: Path, folders: Sequence[Path]) -> Sources:
    checkpoint = open_checkpoint("base", base)
    experts = [open_expert(folder.name, folder, empty_model(checkpoint)) for folder in folders]
    return Materializer(checkpoint, experts, dtype="float32").sources


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_adapter_is_what_peft_merges_into_the_base(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    kind, options = CONFIGURATIONS[name]
    base = tiny.write(tiny.make(kind), tmp_path / kind / "base")
    model = get_peft_model(tiny.load(base, "float32"), LoraConfig(**options))
    train(model, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    sources = read(base, [tmp_path / "adapter"])
    merged = dict(model.merge_and_unload().named_parameters())
    moved = 0
    for s, tensor in enumerate(sources.layout.tensors):
        expected = merged[tensor.name].detach()
        torch.testing.assert_close(sources.expert(0, s), expected, rtol=1e-5, atol=1e-5)
        moved += not torch.equal(expected, sources.base(s))
    assert moved >= 2


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("combination", ["svd", "linear", "ties", "magnitude_prune"])
def test_adapters_combine_as_in_peft(combination: Any, majority_sign: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny.write(tiny.make("llama"), tmp_path / "llama" / "base")
    wide = {**PLAIN, "target_modules": ["q_proj", "embed_tokens", "up_proj"]}
    model = get_peft_model(tiny.load(base, "float32"), LoraConfig(**PLAIN), adapter_name="one")
    model.add_adapter("two", LoraConfig(**{**wide, "lora_alpha": 2}))
    weights = {"one": 0.8, "two": -0.6}
    for seed, adapter in enumerate(weights):
        model.set_adapter(adapter)
        train(model, seed)
    model.save_pretrained(tmp_path / "adapters")
    model.add_weighted_adapter(
        list(weights), list(weights.values()), "both", combination, density=0.4, majority_sign_method=majority_sign
    )
    model.set_adapter("both")
    merged = dict(model.merge_and_unload().named_parameters())

    sources = read(base, [tmp_path / "adapters" / adapter for adapter in weights])
    operator = Lora(LoraOptions(combination=combination, majority_sign=majority_sign))
    num_tensors = sources.num_tensors
    values: dict[str, Tensor] = {
        "coefficient": torch.tensor(list(weights.values()), dtype=torch.float64)[:, None].expand(2, num_tensors)
    }
    if len(operator.parameters) > 1:
        values["density"] = torch.full((len(weights), num_tensors), 0.4, dtype=torch.float64)
    state = operator.prepare(sources, values, None)
    out_P = torch.empty_like(sources.base_P)
    operator.merge(out_P, sources, operator.weights(values, state), state)
    for name, tensor in sources.layout.views(out_P).items():
        torch.testing.assert_close(tensor, merged[name].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "patterns", "embedding and head", "convolution"])
def test_peft_loads_a_merge_that_was_written_as_an_adapter(name: str, tmp_path: Path) -> None:
    """Two adapters of PEFT's, one of another rank, summed: PEFT's model of the base says what the merged one says."""
    from peft import LoraConfig, PeftModel, get_peft_model

    kind, options = CONFIGURATIONS[name]
    base = tiny.write(tiny.make(kind), tmp_path / kind / "base")
    for seed, rank in enumerate((3, 2)):
        model = get_peft_model(tiny.load(base, "float32"), LoraConfig(**{**options, "r": rank}))
        train(model, seed=seed)
        model.save_pretrained(tmp_path / f"adapter{seed}")
    checkpoint = open_checkpoint("base", base)
    experts = [open_expert("one", tmp_path / f"adapter{seed}", empty_model(checkpoint)) for seed in range(2)]
    held = Materializer(checkpoint, experts, dtype="float32")
    operator = TaskArithmetic()
    recipe = Recipe(
        operator=operator.name,
        options={},
        base=str(base),
        experts={f"adapter{seed}": str(tmp_path / f"adapter{seed}") for seed in range(2)},
        dtype="float32",
        groups={"model": tuple(tensor.name for tensor in held.layout.tensors)},
        values={"coefficient": ((0.6,), (-0.4,))},
    )
    held.build(operator, recipe)
    expected = tiny.outputs(held.module).clone()
    write_adapter(held, merged_adapter(held, operator, recipe), checkpoint, tmp_path / "out", lambda _: None)
    plain = tiny.load(base, "float32")
    before = tiny.outputs(plain)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(tiny.outputs(loaded), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
