"""Every registered operator keeps to the device of its sources, wherever that is."""

import pytest
import torch
from pretend_gpu import GPU, PretendGpu, numbers_of
from torch import Tensor

from evomerge.campaign.assemble import OPERATORS
from evomerge.kernels.layout import Layout
from evomerge.kernels.lincomb import task_vector_products
from evomerge.kernels.sources import Dense, Expert, LowRank, Sources
from evomerge.operators.operator import LinearOperator, Operator
from evomerge.records import TensorInfo

SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    "model.layers.0.self_attn.q_proj.weight": (48, 32),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.1.self_attn.q_proj.weight": (32, 64),
}
WITH_FACTORS = 1
NUM_EXPERTS = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1, "nuslerp": 2}


def make_sources(name: str, device: torch.device) -> Sources:
    """Checkpoints; adapters where the operator takes nothing else."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout.of(tuple(TensorInfo(tensor, shape) for tensor, shape in SHAPES.items()))
    base_P = torch.zeros(layout.num_padded)
    for segment in layout.segments:
        base_P[segment] = torch.randn(segment.stop - segment.start, generator=generator)
    experts: list[Expert] = []
    for _ in range(NUM_EXPERTS.get(name, 3)):
        b, a = torch.randn(48, 4, generator=generator), torch.randn(4, 32, generator=generator)
        moved_P = base_P * (1 + 0.1 * torch.randn(base_P.shape, generator=generator))
        experts.append(
            LowRank({WITH_FACTORS: (b.to(device), a.to(device))}, {WITH_FACTORS: 1.0})
            if name == "lora"
            else Dense(moved_P.to(device))
        )
    return Sources(layout, base_P.to(device), tuple(experts))


def merge_twice(operator: Operator, sources: Sources) -> tuple[list[Tensor], Tensor | None]:
    """Two candidates, the second a partial rebuild where that can be; and the products of a gradient."""
    out_P, state, built = torch.zeros_like(sources.base_P), None, []
    products = None
    for factor, changed in ((1.0, None), (0.9, [1, 3] if operator.local else None)):
        values = {
            spec.name: torch.full(
                (sources.num_experts if spec.per_expert else 1, sources.num_tensors),
                max(spec.minimum, factor * spec.default),
                dtype=torch.float64,
            )
            for spec in operator.parameters
        }
        state = operator.prepare(sources, values, state)
        weights_KS = operator.weights(values, state)
        assert weights_KS.device.type == "cpu"
        operator.merge(out_P, sources, weights_KS, state, changed)
        built.append(out_P.clone())
    if isinstance(operator, LinearOperator) and operator.differentiable:
        gradient_E = torch.ones(sources.layout.tensors[WITH_FACTORS].num_elements, device=sources.device)
        products = task_vector_products(gradient_E, operator.directions(sources, state), WITH_FACTORS)
    return built, products


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_operator_keeps_to_its_sources_device(name: str) -> None:
    expected, expected_products = merge_twice(OPERATORS[name](), make_sources(name, torch.device("cpu")))
    with PretendGpu():
        built, products = merge_twice(OPERATORS[name](), make_sources(name, GPU))
        assert all(torch.equal(numbers_of(one), other) for one, other in zip(built, expected, strict=True))
    if expected_products is not None:
        assert products is not None
        assert torch.equal(numbers_of(products), expected_products)


def test_the_pretended_gpu_refuses_to_mix_devices() -> None:
    with PretendGpu():
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        with pytest.raises(AssertionError, match="mixes devices"):
            here + there
        assert torch.equal(numbers_of(there * 2), 2 * here)
        assert torch.equal((there * 2).cpu(), 2 * here)
