"""Whole checkpoints around the tensors of ``tests/golden``: merging works tensor by tensor, so parity shows on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.materialize.resident import quiet_transformers

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``inputs/base``, ``inputs/v1`` ... as ``tests/golden/README.md`` describes them."""
    folder = tmp_path_factory.mktemp("mergekit")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name in ("base", "v1", "v2", "v3"):
        state = model.state_dict()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
            for tensor, known in load_file(GOLDEN / f"{name}.safetensors").items():
                state[tensor][: len(known)] = known
        with quiet_transformers():
            model.save_pretrained(folder / "inputs" / name)
    return folder


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Write a mergekit file beside the inputs."""

    def write(sections: dict[str, Any], name: str = "config.yaml") -> Path:
        path = folder / name
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    return write
