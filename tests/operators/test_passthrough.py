"""Passthrough copies; what it copies is chosen by the coefficients."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from operator_contract import DTYPES, ODD_SIZES, OperatorContract, Problem, TwinResult, merge
from torch import Tensor

from evomerge.operators.passthrough import Passthrough


class TestPassthrough(OperatorContract):
    def make(self) -> Passthrough:
        return Passthrough()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Preferences close together, the first expert's never the largest, so that a small step changes the source."""
        preferences = 0.5 + 0.01 * torch.rand(num_experts, num_tensors, generator=generator, dtype=torch.float64)
        preferences[0] = 0.49
        scale = 0.5 + torch.rand(1, num_tensors, generator=generator, dtype=torch.float64)
        return {"coefficient": preferences, "scale": scale}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        best = max(range(len(experts)), key=lambda k: float(values["coefficient"][k]))
        merged = float(values["scale"][0]) * experts[best].double()
        return TwinResult(merged, merged.abs(), torch.zeros_like(merged, dtype=torch.bool))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_copy_is_the_same_bits(self, dtype: torch.dtype) -> None:
        """Also the sign of a zero, which a sum would lose."""
        held = self.problem(ODD_SIZES, dtype, num_experts=2)
        for expert in held.experts:
            expert["t1"][:5] = -0.0
        sources = (1, 0, 1, 0, 1)
        coefficients = torch.tensor([[1.0 - k for k in sources], [float(k) for k in sources]], dtype=torch.float64)
        values = {"coefficient": coefficients, "scale": torch.ones(1, len(sources), dtype=torch.float64)}
        merged = merge(self.make(), Problem(held.base, held.experts, values))
        for (name, tensor), k in zip(merged.items(), sources, strict=True):
            assert torch.equal(tensor.view(torch.uint8), held.experts[k][name].view(torch.uint8))

    def test_a_scale_of_zero_gives_zeros(self) -> None:
        held = self.problem((1025, 7))
        values = {**held.values, "scale": torch.tensor([[0.0, 1.0]], dtype=torch.float64)}
        merged = merge(self.make(), Problem(held.base, held.experts, values))
        assert not merged["t0"].any()
        assert merged["t1"].all()
