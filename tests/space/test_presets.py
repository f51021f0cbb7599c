"""The presets in search_spaces/ on the models they are for, built without memory."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from evomerge.records import ParameterSpec, TensorIndex, TensorInfo
from evomerge.space.depth import group_depths
from evomerge.space.groups import Groups, make_groups
from evomerge.space.space import Range, Searched, Space

PRESETS = Path(__file__).parents[2] / "search_spaces"
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "GemmaForCausalLM": ("GemmaConfig", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", {}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTConfig", {}),
    "ViTForImageClassification": ("ViTConfig", {"num_labels": 3}),
    "CLIPVisionModel": ("CLIPVisionConfig", {}),
}
NUM_LAYERS = 3


def tensors_of(model_name: str) -> TensorIndex:
    """Names and shapes of a tiny model of a class."""
    config_name, further = {**DECODERS, **ENCODERS}[model_name]
    sizes = TEXT if model_name in DECODERS else VISION
    with torch.device("meta"):
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes, **further))
    return tuple(TensorInfo(name, tuple(tensor.shape)) for name, tensor in model.named_parameters())


def preset(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return content


def assert_partition(groups: Groups, tensors: TensorIndex) -> None:
    assert sorted(name for group in groups.values() for name in group) == sorted(tensor.name for tensor in tensors)


def test_every_preset_is_tested_here() -> None:
    names = {path.stem for path in PRESETS.glob("*.yaml")}
    assert names == {"decoder", "vit", "per-task", "per-layer", "per-module", "per-tensor", "depth"}


@pytest.mark.parametrize("name", [path.stem for path in sorted(PRESETS.glob("*.yaml"))])
def test_a_preset_is_a_space(name: str) -> None:
    content = preset(name)
    assert content.keys() == {"groups", "coefficient"}
    spec = ParameterSpec(name="coefficient", meaning="of a task vector", default=0.3, low=-0.2, high=1.2)
    tensors = tensors_of("ViTModel" if name == "vit" else "LlamaForCausalLM")
    groups = make_groups(tensors, content["groups"])
    setting = Range(**content["coefficient"])
    space = Space(("a", "b"), groups, group_depths(tensors, groups), [Searched(spec=spec, setting=setting)])
    assert len(space) == 2 * (setting.knots or len(groups))


@pytest.mark.parametrize("model_name", DECODERS)
def test_the_decoder_preset(model_name: str) -> None:
    tensors = tensors_of(model_name)
    groups = make_groups(tensors, preset("decoder")["groups"])
    assert_partition(groups, tensors)
    assert sorted(groups) == sorted(
        [*(f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(NUM_LAYERS)), "norm", "embed"]
    )
    assert "model.embed_tokens.weight" in groups["embed"]
    assert "model.norm.weight" in groups["norm"]
    for layer in range(NUM_LAYERS):
        attention = [name for name in groups[f"attn.{layer}"] if name.endswith(".weight")]
        assert [name.split(".")[-2] for name in attention] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert all(f".layers.{layer}." in name for name in groups[f"attn.{layer}"])
        assert sorted(name.split(".")[-2] for name in groups[f"mlp.{layer}"]) == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize("model_name", ENCODERS)
def test_the_vit_preset(model_name: str) -> None:
    tensors = tensors_of(model_name)
    groups = make_groups(tensors, preset("vit")["groups"])
    assert_partition(groups, tensors)
    assert sorted(groups) == sorted(
        [*(f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(NUM_LAYERS)), "norm", "rest"]
    )
    for layer in range(NUM_LAYERS):
        assert len(groups[f"attn.{layer}"]) == 8, "query, key, value and output, with their biases"
        assert len(groups[f"mlp.{layer}"]) == 4
        assert all(f".{layer}." in name for name in (*groups[f"attn.{layer}"], *groups[f"mlp.{layer}"]))
    assert not any(re.search(r"\.\d+\.", name) for name in groups["rest"])


@pytest.mark.parametrize("model_name", [*DECODERS, *ENCODERS])
def test_the_general_presets(model_name: str) -> None:
    tensors = tensors_of(model_name)
    by_preset = {
        name: make_groups(tensors, preset(name)["groups"])
        for name in ("per-task", "per-layer", "per-module", "per-tensor")
    }
    for groups in by_preset.values():
        assert_partition(groups, tensors)
    assert len(by_preset["per-task"]) == 1
    assert list(by_preset["per-layer"]) == ["before", *(f"layer{i}" for i in range(NUM_LAYERS)), "after"]
    assert len(by_preset["per-tensor"]) == len(tensors)
    for layer in range(NUM_LAYERS):
        kinds = {name.split(".")[1] for name in by_preset["per-module"] if name.startswith(f"layer{layer}.")}
        assert kinds == {"attn", "mlp", "norm"}
