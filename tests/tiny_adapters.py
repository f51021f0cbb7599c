"""Adapters as PEFT writes them, without PEFT: the two files, by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG: dict[str, Any] = {  # what PEFT 0.21.2 writes for LoraConfig(r=2)
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "SomeModel", "parent_library": "transformers.models"},
    "base_model_name_or_path": "where/the/base/lay/when/it/was/trained",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 3,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """Write tensors (named without PEFT's prefix) and the configuration with some keys changed."""
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def random_factors(
    model: nn.Module, modules: Sequence[str], *, rank: int = 2, seed: int = 0, scale: float = 0.2
) -> dict[str, Tensor]:
    """Return lora_A and lora_B of modules whose weight is (out, in) or a convolution's, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    tensors = {}
    for module in modules:
        rows, *columns = weights[f"{module}.weight"].shape
        further = [1] * (len(columns) - 1)  # the kernel of lora_B
        tensors[f"{module}.lora_A.weight"] = scale * torch.randn(rank, *columns, generator=generator)
        tensors[f"{module}.lora_B.weight"] = scale * torch.randn(rows, rank, *further, generator=generator)
    return tensors


def products(tensors: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Return module -> scaling * B A in float64, in the shape of (rows of B, columns of A)."""
    return {
        name.removesuffix(".lora_A.weight"): scaling
        * (tensors[name.replace("lora_A", "lora_B")].double().flatten(1) @ tensor.double().flatten(1))
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
