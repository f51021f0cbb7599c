"""The guard tells fine-tuned experts from transformed, permuted and unrelated ones, on a real Llama and a real ViT."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent / "materialize"))
import tiny_checkpoints as tiny

from evomerge.kernels.layout import Layout
from evomerge.kernels.sources import Dense, Sources
from evomerge.materialize.guard import GuardReport, inspect_experts
from evomerge.materialize.resident import merged_tensors, tensor_index


def flat(model: Any, layout: Layout) -> torch.Tensor:
    buffer_P = torch.zeros(layout.num_padded)
    layout.flatten(merged_tensors(model), buffer_P)
    return buffer_P


def inspect(base: Any, **experts: Any) -> GuardReport:
    layout = Layout.of(tensor_index(base))
    sources = Sources(layout, flat(base, layout), tuple(Dense(flat(expert, layout)) for expert in experts.values()))
    return inspect_experts(sources, list(experts), base.config.to_dict())


def attention(model: Any) -> list[Any]:
    layers = model.model.layers if hasattr(model, "model") else model.layers
    return [getattr(layer, "self_attn", None) or layer.attention for layer in layers]


def transformed(base: Any, what: str, seed: int) -> Any:
    """Multiply queries by A^T and keys by A^-1 (values by A, outputs by A^-1), head by head: the function is kept."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in attention(model):
            width = module.head_dim
            heads = module.k_proj.weight.shape[0] // width
            for head in range(heads):
                scaled = torch.randn(width, width, generator=generator) + 3 * torch.eye(width)[torch.randperm(width)]
                own = slice(head * width, (head + 1) * width)
                groups = module.q_proj.weight.shape[0] // module.k_proj.weight.shape[0]
                queries = [slice(q * width, (q + 1) * width) for q in range(head * groups, (head + 1) * groups)]
                if what == "qk":
                    module.k_proj.weight[own] = torch.linalg.inv(scaled) @ module.k_proj.weight[own]
                    for query in queries:
                        module.q_proj.weight[query] = scaled.T @ module.q_proj.weight[query]
                else:
                    module.v_proj.weight[own] = scaled @ module.v_proj.weight[own]
                    if module.v_proj.bias is not None:
                        module.v_proj.bias[own] = scaled @ module.v_proj.bias[own]
                    for query in queries:
                        module.o_proj.weight[:, query] = module.o_proj.weight[:, query] @ torch.linalg.inv(scaled)
    return model


def permuted(base: Any) -> Any:
    """Another order of the hidden units of every feed-forward layer: the function is kept."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for layer in model.model.layers:
            order = torch.randperm(layer.mlp.up_proj.weight.shape[0], generator=torch.Generator().manual_seed(0))
            for projection in (layer.mlp.up_proj, layer.mlp.gate_proj):
                projection.weight[:] = projection.weight[order]
            layer.mlp.down_proj.weight[:] = layer.mlp.down_proj.weight[:, order]
    return model


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_fine_tuned_experts_raise_no_suspicion_and_have_the_norms_they_were_given(kind: str) -> None:
    base = tiny.make(kind)
    report = inspect(base, one=tiny.tuned(base, 1, 0.01), two=tiny.tuned(base, 2, 0.01))
    assert report.suspicions == ()
    attn = report.norms_KN[:, report.kinds.index("attn")]
    assert attn == pytest.approx([0.05, 0.05], rel=0.1)  # the weights' own deviation is 0.2
    assert report.cosines_KK == pytest.approx(np.eye(2), abs=0.05)


@pytest.mark.parametrize("kind", ["llama", "vit"])
@pytest.mark.parametrize("what", ["qk", "vo"])
def test_transformed_attention_is_told_by_the_products_that_it_keeps(kind: str, what: str) -> None:
    base = tiny.make(kind)
    locked = transformed(tiny.tuned(base, 1, 0.003), what, seed=3)
    if what == "vo":
        before, after = tiny.outputs(tiny.tuned(base, 1, 0.003)), tiny.outputs(locked)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)  # the function is kept
    report = inspect(base, good=tiny.tuned(base, 2, 0.003), locked=locked)
    assert [(suspicion.expert, "MergeLock" in suspicion.sign) for suspicion in report.suspicions] == [("locked", True)]
    assert "leave it out" in report.suspicions[0].advice


def test_permuted_units_are_told_from_another_base() -> None:
    base = tiny.make("llama")
    shuffled = permuted(tiny.tuned(base, 1, 0.003))
    torch.testing.assert_close(tiny.outputs(shuffled), tiny.outputs(tiny.tuned(base, 1, 0.003)), rtol=1e-4, atol=1e-4)
    report = inspect(base, shuffled=shuffled, stranger=tiny.make("llama", seed=9))
    found = {suspicion.expert: suspicion.sign for suspicion in report.suspicions}
    assert "permuted" in found["shuffled"]
    assert "another base" in found["stranger"]
    assert len(report.suspicions) == 2


def test_the_base_itself_and_the_same_expert_twice_are_named() -> None:
    base = tiny.make("llama")
    expert = tiny.tuned(base, 1, 0.01)
    report = inspect(base, nothing=copy.deepcopy(base), one=expert, again=copy.deepcopy(expert))
    assert [(suspicion.expert, suspicion.sign.split(" ")[0:3]) for suspicion in report.suspicions] == [
        ("nothing", ["its", "tensors", "are"]),
        ("again", ["its", "task", "vector"]),
    ]
    assert report.norms_KN[0].tolist() == [0.0] * len(report.kinds)


def test_one_module_that_moved_far_is_named() -> None:
    base = tiny.make("llama")
    expert = tiny.tuned(base, 1, 0.003)
    with torch.no_grad():
        expert.lm_head.weight.add_(torch.randn(expert.lm_head.weight.shape))
    [suspicion] = inspect(base, expert=expert).suspicions
    assert suspicion.sign.startswith("lm_head.weight moved by")
