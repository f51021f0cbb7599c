"""Tiny real models of transformers, written to disk the way its users write them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from evomerge.materialize.resident import quiet_transformers

KINDS = ("llama", "tied", "vit")
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6]])


def make(kind: str, seed: int = 0) -> Any:
    """A random model of some ten thousand parameters, with weights large enough to matter."""
    torch.manual_seed(seed)
    if kind == "vit":
        vit = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=36,
            image_size=8,
            patch_size=4,
            initializer_range=0.2,
        )
        return ViTModel(vit).eval()
    llama = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        vocab_size=61,
        max_position_embeddings=64,
        tie_word_embeddings=kind == "tied",
        initializer_range=0.2,
    )
    return LlamaForCausalLM(llama).eval()


def tuned(model: nn.Module, seed: int, scale: float = 0.1) -> Any:
    """A fine-tuned copy: every tensor moved a little."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return moved


def write(model: Any, folder: Path, dtype: str = "float32", max_shard_size: str = "1GB") -> Path:
    with quiet_transformers():
        copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_family(kind: str, dtype: str, folder: Path, num_experts: int = 2) -> list[Path]:
    """Base and experts; return their folders, the base first."""
    base = make(kind)
    models = [base, *(tuned(base, seed=1 + k) for k in range(num_experts))]
    return [write(model, folder / name, dtype) for name, model in zip(("base", "one", "two"), models, strict=False)]


def load(folder: Path, dtype: str) -> Any:
    """The model as a user loads it."""
    with quiet_transformers():
        kind = AutoModel if "vit" in folder.parts[-2] else LlamaForCausalLM
        return kind.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def outputs(model: Any) -> Tensor:
    """What the model says of a fixed input, in its own dtype."""
    with torch.inference_mode():
        if isinstance(model, ViTModel):
            pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
            pooled: Tensor = model(pixel_values=pixels.to(model.dtype)).pooler_output
            return pooled
        logits: Tensor = model(input_ids=TOKENS).logits
        return logits
