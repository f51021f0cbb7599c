"""Model Stock against its formula, pair by pair of experts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from operator_contract import (
    DifferentiableContract,
    OperatorContract,
    Problem,
    TwinResult,
    lay_out,
    lines_of,
    matrix_shape,
    merge,
)
from torch import Tensor

from evomerge.errors import CampaignError
from evomerge.operators.model_stock import ModelStock, ModelStockOptions
from evomerge.operators.operator import Operator


class ModelStockTwin(OperatorContract):
    fewest = 2

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"scale": torch.rand((1, num_tensors), generator=generator, dtype=torch.float64) * 1.5 + 0.1}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        by_line = zip(*(lines_of(tensor, self.make().options.vectors) for tensor in (base, *experts)), strict=True)
        parts = [self.line(origin, group, values["scale"][0]) for origin, *group in by_line]
        merged, magnitude = (torch.stack(part).view(base.shape) for part in zip(*parts, strict=True))
        return TwinResult(merged, magnitude.detach(), torch.zeros_like(merged, dtype=torch.bool))

    def line(self, base: Tensor, experts: Sequence[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t) base + t mean, and the sum of the absolute terms."""
        # Rounded to float32, as task vectors are everywhere: nearly opposite ones magnify that rounding.
        units = [tau / tau.norm() for tau in ((expert.float() - base.float()).double() for expert in experts)]
        cosines = [float((one * other).sum()) for one, other in combinations(units, 2)]
        cosine, size = sum(cosines) / len(cosines), len(experts)
        divisor = 1 + (size - 1) * cosine
        t = scale * (size * cosine / divisor if divisor > 1e-6 else 0.0)
        held = torch.stack([expert.double() for expert in experts])
        magnitude = base.double().abs() * (1 + t.abs()) + t.abs() * held.abs().mean(0)
        return (1 - t) * base.double() + t * held.mean(0), magnitude


class TestModelStock(ModelStockTwin, DifferentiableContract):
    def make(self) -> Operator:
        return ModelStock()

    def test_it_wants_two_experts(self) -> None:
        problem = self.problem((5,))
        with pytest.raises(CampaignError, match="at least two experts"):
            self.make().prepare(lay_out(replace(problem, experts=[problem.base])), {}, None)

    def test_equal_experts_are_taken_whole(self) -> None:
        problem = self.problem((1, 7, 1030))
        values = {"scale": torch.ones(1, 3, dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, [problem.experts[0]] * 3, values))
        for name, tensor in problem.experts[0].items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)

    def test_experts_at_right_angles_and_opposite_ones_are_left(self) -> None:
        """At right angles the ratio is 0; opposite directions cancel, where the formula divides by zero."""
        base = {"t0": torch.tensor([1.0, 2.0]), "t1": torch.tensor([1.0, 2.0])}
        one = {"t0": torch.tensor([1.5, 2.0]), "t1": torch.tensor([1.5, 2.0])}
        other = {"t0": torch.tensor([1.0, 4.0]), "t1": torch.tensor([0.0, 2.0])}
        values = {"scale": torch.ones(1, 2, dtype=torch.float64)}
        merged = merge(self.make(), Problem(base, [one, other], values))
        assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())

    def test_the_cosine_of_small_updates_is_not_cut_short(self) -> None:
        """4,096 updates of 1e-5 that half agree: a norm product clamped at 1e-6 would report half of the cosine."""
        generator = torch.Generator().manual_seed(0)
        shared, *own = (1e-5 * torch.randn(4096, generator=generator) for _ in range(3))
        base = {"t0": torch.zeros(4096)}
        experts = [{"t0": 2 * shared + tau} for tau in own]
        [held] = ModelStock().prepare(lay_out(Problem(base, experts, {})), {}, None)
        assert float(held[0]) == pytest.approx(0.8 / 1.8, abs=0.02)  # half of 2 c / (1 + c), c = 4 / 5


class TestModelStockOfRows(ModelStockTwin):
    shape = staticmethod(matrix_shape)

    def make(self) -> Operator:
        return ModelStock(ModelStockOptions(vectors="rows"))

    def test_it_says_that_it_has_no_gradient(self) -> None:
        assert not self.make().differentiable
