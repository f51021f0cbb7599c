"""NearSwap against its formula and mergekit."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from golden import assert_equals_mergekit, golden_problem
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import OperatorContract, Problem, TwinResult, inherited, lay_out, merge
from torch import Tensor

from evomerge.errors import InputError
from evomerge.operators.nearswap import NearSwap
from evomerge.operators.operator import Operator


class TestNearSwap(OperatorContract):
    fewest, most = 1, 1

    def make(self) -> Operator:
        return NearSwap()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Around the size of the task vectors, 0.1."""
        return {"t": 0.2 * torch.rand(1, num_tensors, generator=generator, dtype=torch.float64)}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        base, expert, t = base.double(), experts[0].double(), float(values["t"][0])
        share = (t / (expert - base).abs().clamp(min=1e-6)).clamp(max=1.0)
        merged = share * expert + (1 - share) * base
        return TwinResult(merged, base.abs() + expert.abs() + t, torch.zeros_like(base, dtype=torch.bool))

    @given(dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), seed=st.integers(0, 2**31))
    @inherited
    def test_what_lies_within_t_is_the_experts_bit_for_bit(self, dtype: torch.dtype, seed: int) -> None:
        problem = self.problem((1030,), dtype, seed=seed)
        merged = merge(self.make(), problem)["t0"]
        base, expert, t = problem.base["t0"].double(), problem.experts[0]["t0"], float(problem.values["t"])
        near = (expert.double() - base).abs() <= t * (1 - 1e-6)
        assert torch.equal(merged[near], expert[near])

    def test_t_of_zero_gives_the_base_exactly(self) -> None:
        problem = self.problem((1030,), torch.bfloat16)
        merged = merge(self.make(), Problem(problem.base, problem.experts, {"t": torch.zeros(1, 1).double()}))
        assert torch.equal(merged["t0"], problem.base["t0"])

    def test_more_than_one_expert_is_refused(self) -> None:
        problem = self.problem((5,))
        twice = Problem(problem.base, [*problem.experts, *problem.experts], problem.values)
        with pytest.raises(InputError, match="expected one expert .*, found 2; name one"):
            self.make().prepare(lay_out(twice), twice.values, None)


def test_equals_mergekit() -> None:
    problem = golden_problem("nearswap_a", {"t": 0.01}, ("base", "v1"))
    assert_equals_mergekit("nearswap_a", problem, merge(NearSwap(), problem))
