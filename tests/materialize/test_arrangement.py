"""Models whose layers are arranged anew: another depth, layers of several checkpoints, the same layer twice."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evomerge.errors import CampaignError, CheckpointError
from evomerge.materialize.arrangement import Output, arrange
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import quiet_transformers
from evomerge.materialize.write import write_checkpoint
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.operators.passthrough import Passthrough
from evomerge.records import Layers, Recipe

Checkpoints = Callable[[str, str], list[Checkpoint]]


def build(
    held: Materializer, operator: Operator, values: Mapping[str, Any], layers: Layers | None = None
) -> dict[str, Tensor]:
    names = tuple(tensor.name for tensor in held.layout.tensors)
    columns = {parameter: tuple(map(tuple, matrix)) for parameter, matrix in values.items()}
    recipe = Recipe(
        operator=operator.name, options={}, base="b", experts={"one": "1", "two": "2"}, dtype="float32",
        groups={name: (name,) for name in names}, values=columns, layers=layers,
    )  # fmt: skip
    held.build(operator, recipe)
    module = held.resident.module
    assert isinstance(module, nn.Module)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def preferences(held: Materializer, layers: Layers) -> dict[str, Any]:
    """One source a tensor: passthrough's coefficients."""
    rows = []
    for k in range(1, len(layers[0])):
        row = []
        for name in (tensor.name for tensor in held.layout.tensors):
            outside = 0 if "embed" in name else -1
            i = int(name.split(".")[2]) if ".layers." in name else outside
            row.append(float(layers[i][k] is not None))
        rows.append(row)
    return {"coefficient": rows, "scale": [[1.0] * len(rows[0])]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_layers_of_two_models_stand_in_one(checkpoints: Checkpoints, tmp_path: Path, kind: str, dtype: str) -> None:
    """One's layers 0 and 1, two's layer 1, and one's layer 0 again: bit for bit, and a model that runs."""
    base, *experts = checkpoints(kind, dtype)
    layers: Layers = ((None, 0, None), (None, 1, None), (None, None, 1), (None, 0, None))
    held = Materializer(base, experts, dtype=dtype, output=Output(layers=layers))
    merged = build(held, Passthrough(), preferences(held, layers), layers)
    one, two = (tiny.load(expert.folder, dtype).state_dict() for expert in experts)
    for name, tensor in merged.items():
        if ".layers." in name:
            i = int(name.split(".")[2])
            source = (one, one, two, one)[i]
            expected = source[name.replace(f".{i}.", f".{(0, 1, 1, 0)[i]}.")]
        else:
            expected = one[name]
        assert torch.equal(tensor, expected), name
    module: Any = held.resident.module
    assert module.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in module.model.layers] == [0, 1, 2, 3]
    assert tiny.outputs(module).isfinite().all()
    write_checkpoint(held, tmp_path / "out", lambda _: None)
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype)).eval()
    assert torch.equal(tiny.outputs(loaded), tiny.outputs(module))


def test_task_vectors_are_taken_from_the_layers_named(checkpoints: Checkpoints) -> None:
    """Layer 0 of the result from layer 1 of base and one, where two takes no part; layer 1 from layers 0 of all."""
    base, *experts = checkpoints("llama", "float32")
    layers: Layers = ((1, 1, None), (0, 0, 0))
    held = Materializer(base, experts, dtype="float32", output=Output(layers=layers))
    num_tensors = len(held.layout.tensors)
    merged = build(held, TaskArithmetic(), {"coefficient": [[0.5] * num_tensors, [0.25] * num_tensors]}, layers)
    states = [tiny.load(checkpoint.folder, "float32").state_dict() for checkpoint in (base, *experts)]
    for name, tensor in merged.items():
        source = (
            name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("layers.x.", "layers.1.")
        )
        b, one, two = (state[source] for state in states)
        if name.startswith(("model.layers.0.", "model.embed")):
            two = b
        torch.testing.assert_close(tensor, b + 0.5 * (one - b) + 0.25 * (two - b), rtol=0, atol=1e-6)


def test_a_checkpoint_has_the_same_hash_however_its_layers_are_used(checkpoints: Checkpoints) -> None:
    base, *experts = checkpoints("llama", "float32")
    plain = Materializer(base, experts, dtype="float32")
    arranged = Materializer(base, experts, dtype="float32", output=Output(layers=((1, 0, None), (None, None, 1))))
    assert arranged.hashes == plain.hashes


def test_a_result_of_another_dtype_is_rounded_once(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base, *experts = checkpoints("llama", "float32")
    exact = Materializer(base, experts, dtype="float32")
    rounded = Materializer(base, experts, dtype="float32", output=Output(dtype="bfloat16"))
    values = {"coefficient": [[0.3] * len(exact.layout.tensors), [0.9] * len(exact.layout.tensors)]}
    one, other = (build(held, TaskArithmetic(), values) for held in (exact, rounded))
    assert all(torch.equal(tensor.bfloat16(), other[name]) for name, tensor in one.items())
    assert rounded.hashes == exact.hashes
    write_checkpoint(rounded, tmp_path / "out", lambda _: None)
    assert open_checkpoint("out", tmp_path / "out").dtype == "bfloat16"


def test_what_a_configuration_lists_by_layer_follows_the_layers(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=30, use_sliding_window=True, sliding_window=4, layer_types=kinds,
    )  # fmt: skip
    tiny.write(Qwen3ForCausalLM(config), tmp_path / "qwen")
    checkpoint = open_checkpoint("base", tmp_path / "qwen")
    found = arrange([checkpoint, checkpoint], ((1, 1), (None, 0), (1, 1), (2, 2), (0, None)))
    assert found.config.num_hidden_layers == 5
    assert found.config.layer_types == [kinds[j] for j in (1, 0, 1, 2, 0)]


def test_mistakes_are_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base, one, _ = checkpoints("llama", "float32")
    with pytest.raises(CampaignError, match="layer 1: one has layers 0 to 1, not 2"):
        arrange([base, one], ((0, 0), (None, 2)))
    wide = open_checkpoint("wide", write_wider(tmp_path / "wide"))
    with pytest.raises(
        CheckpointError, match=r"wide: model\.layers\.0\.\S+: expected shape \[.*\] to take the place of"
    ):
        arrange([base, wide], ((0, 0),))


def write_wider(folder: Path) -> Path:
    model = tiny.make("llama")
    config = model.config
    config.intermediate_size = 44
    return tiny.write(type(model)(config), folder)
