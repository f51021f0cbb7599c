"""Task arithmetic and linear merging against their formulas."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_contract import DTYPES, DifferentiableContract, Problem, TwinResult, inherited, merge
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.operators.linear import Linear, LinearOptions, TaskArithmetic
from evomerge.operators.operator import Operator

SIZES = (1, 1025, 40)


def decided(merged: Tensor, magnitude: Tensor) -> TwinResult:
    return TwinResult(merged, magnitude, torch.zeros_like(merged, dtype=torch.bool))


def any_finite(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bit patterns: huge, tiny and subnormal numbers of both signs; NaN and infinity become 1."""
    generator = torch.Generator().manual_seed(seed)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    limits = torch.iinfo(bits)
    numbers = torch.randint(limits.min, limits.max, (size,), generator=generator, dtype=bits).view(dtype)
    return torch.where(numbers.isfinite(), numbers, torch.ones_like(numbers))


def any_checkpoints(num_experts: int, dtype: torch.dtype, seed: int) -> list[dict[str, Tensor]]:
    return [
        {f"t{s}": any_finite(size, dtype, seed * 100 + 10 * k + s) for s, size in enumerate(SIZES)}
        for k in range(num_experts + 1)
    ]


class TestTaskArithmetic(DifferentiableContract):
    def make(self) -> Operator:
        return TaskArithmetic()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Of both signs, and summing to more than one."""
        coefficients = torch.rand((num_experts, num_tensors), generator=generator, dtype=torch.float64)
        return {"coefficient": coefficients * 1.4 - 0.2}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        coefficients = values["coefficient"]
        merged = base.double()
        for coefficient, expert in zip(coefficients, experts, strict=True):
            merged = merged + coefficient * (expert.double() - base.double())
        magnitude = base.double().abs() * (1 + coefficients.abs().sum())
        for coefficient, expert in zip(coefficients, experts, strict=True):
            magnitude = magnitude + coefficient.abs() * expert.double().abs()
        return decided(merged, magnitude)

    @given(num_experts=st.integers(1, 4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6))
    @settings(max_examples=30)
    def test_zero_coefficients_give_the_base_exactly(self, num_experts: int, dtype: torch.dtype, seed: int) -> None:
        base, *experts = any_checkpoints(num_experts, dtype, seed)
        zeros = torch.zeros(num_experts, len(SIZES), dtype=torch.float64)
        merged = merge(self.make(), Problem(base, experts, {"coefficient": zeros}))
        assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())

    @given(
        num_experts=st.integers(1, 4),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 10**6),
        which=st.integers(0, 3),
    )
    @settings(max_examples=30)
    def test_one_expert_at_1_gives_that_expert_exactly(
        self, num_experts: int, dtype: torch.dtype, seed: int, which: int
    ) -> None:
        base, *experts = any_checkpoints(num_experts, dtype, seed)
        chosen = which % num_experts
        one_hot = torch.zeros(num_experts, len(SIZES), dtype=torch.float64)
        one_hot[chosen] = 1.0
        merged = merge(self.make(), Problem(base, experts, {"coefficient": one_hot}))
        assert all(torch.equal(merged[name], tensor) for name, tensor in experts[chosen].items())

    def test_weights_are_the_coefficients_with_the_base_once(self) -> None:
        coefficients = torch.tensor([[0.3, -0.1], [0.9, 1.2]], dtype=torch.float64)
        weights = self.make().weights({"coefficient": coefficients}, None)
        assert weights.tolist() == [[1.0, 1.0], [0.3, -0.1], [0.9, 1.2]]
        assert weights.dtype == torch.float64


class LinearTwin(DifferentiableContract):
    normalized: bool

    def make(self) -> Operator:
        return Linear(LinearOptions(normalize=self.normalized))

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        coefficients = values["coefficient"]
        divisor = coefficients.sum() if self.normalized else torch.ones((), dtype=torch.float64)
        merged = torch.zeros(base.shape, dtype=torch.float64)
        magnitude = torch.zeros(base.shape, dtype=torch.float64)
        for coefficient, expert in zip(coefficients, experts, strict=True):
            merged = merged + coefficient * expert.double() / divisor
            magnitude = magnitude + (coefficient * expert.double() / divisor).abs()
        return decided(merged, magnitude)

    @given(scale=st.floats(-1e30, 1e30).filter(lambda x: abs(x) > 1e-6), seed=st.integers(0, 2**31))
    @inherited
    def test_the_base_does_not_take_part(self, scale: float, seed: int) -> None:
        """With coefficients that are exact in binary the base's weight vanishes altogether."""
        problem = self.problem((1030,), num_experts=2, seed=seed)
        values = {"coefficient": torch.tensor([[0.25], [0.75]], dtype=torch.float64)}
        other_base = {name: torch.full_like(tensor, scale) for name, tensor in problem.base.items()}
        one = merge(self.make(), Problem(problem.base, problem.experts, values))
        other = merge(self.make(), Problem(other_base, problem.experts, values))
        assert all(torch.equal(one[name], other[name]) for name in one)


class TestLinearNormalized(LinearTwin):
    normalized = True

    @given(factor=st.floats(0.01, 100))
    @settings(max_examples=20)
    def test_only_the_ratio_of_the_coefficients_matters(self, factor: float) -> None:
        coefficients = torch.tensor([[0.2], [0.5], [0.1]], dtype=torch.float64)
        weights, scaled = (self.make().weights({"coefficient": c}, None) for c in (coefficients, factor * coefficients))
        torch.testing.assert_close(weights, scaled, rtol=1e-12, atol=0)
        assert float(weights[1:].sum()) == pytest.approx(1.0, abs=1e-12)

    @pytest.mark.parametrize("column", [(0.5, -0.5), (0.0, 0.0)])
    def test_coefficients_that_sum_to_zero_are_a_failed_candidate(self, column: tuple[float, float]) -> None:
        good_and_bad = torch.tensor([[0.5, column[0]], [0.5, column[1]]], dtype=torch.float64)
        with pytest.raises(CandidateError, match="sum to zero"):
            self.make().weights({"coefficient": good_and_bad}, None)

    def test_one_expert_alone_is_that_expert_exactly(self) -> None:
        base, *experts = any_checkpoints(3, torch.bfloat16, seed=5)
        values = {"coefficient": torch.tensor([[0.0], [0.7], [0.0]], dtype=torch.float64).expand(3, len(SIZES))}
        merged = merge(self.make(), Problem(base, experts, values))
        assert all(torch.equal(merged[name], tensor) for name, tensor in experts[1].items())


class TestLinearAsItIs(LinearTwin):
    normalized = False

    def test_coefficients_that_sum_to_zero_are_allowed(self) -> None:
        problem = self.problem((9,), num_experts=2)
        values = {"coefficient": torch.tensor([[0.5], [-0.5]], dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, values))["t0"]
        torch.testing.assert_close(merged, 0.5 * problem.experts[0]["t0"] - 0.5 * problem.experts[1]["t0"])
