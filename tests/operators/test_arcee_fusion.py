"""Arcee Fusion against its formula and mergekit."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from golden import differs, golden_problem, reference
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import (
    DTYPES,
    OperatorContract,
    Problem,
    TwinResult,
    inherited,
    lay_out,
    lines_of,
    matrix_shape,
    merge,
)
from torch import Tensor

from evomerge.errors import InputError
from evomerge.operators.arcee_fusion import ArceeFusion
from evomerge.operators.operator import Operator


def importances(base: Tensor, expert: Tensor) -> tuple[Tensor, float, float]:
    """By the definition, row by row in float64; median and bound by sorting."""
    rows = []
    for base_row, expert_row in zip(lines_of(base.double(), "rows"), lines_of(expert.double(), "rows"), strict=True):
        p, q = expert_row.exp() / expert_row.exp().sum(), base_row.exp() / base_row.exp().sum()
        rows.append((expert_row - base_row).abs() * (p * ((p + 1e-8) / (q + 1e-8)).log()).sum())
    importance = torch.cat(rows).view(base.shape)
    ordered = importance.flatten().sort().values
    lower, median, upper = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75))
    return importance, median, median + 1.5 * (upper - lower)


class TestArceeFusion(OperatorContract):
    fewest, most = 1, 1
    most_undecided = 0.5  # of a few entries one may be at the bound

    def make(self) -> Operator:
        return ArceeFusion()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def shape(self, size: int) -> tuple[int, ...]:
        return matrix_shape(size)

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        [expert] = experts
        importance, median, bound = importances(base, expert)
        merged = torch.where(importance > bound, expert, base).double()
        # If the quartiles are equal, the bound is an entry, and that is not above itself in any arithmetic.
        undecided = ((importance - bound).abs() < 1e-5 * bound) & (bound > median)
        return TwinResult(merged, merged.abs(), undecided)

    @given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
    @inherited
    def test_every_entry_is_the_bases_or_the_experts_bit_for_bit(self, dtype: torch.dtype, seed: int) -> None:
        problem = self.problem((1035,), dtype, seed=seed)
        merged, base, expert = merge(self.make(), problem)["t0"], problem.base["t0"], problem.experts[0]["t0"]
        assert ((merged == base) | (merged == expert)).all()
        assert 0.02 < (merged == expert).double().mean() < 0.2

    def test_an_equal_expert_gives_the_base(self) -> None:
        problem = self.problem((1035, 7), torch.bfloat16)
        merged = merge(self.make(), Problem(problem.base, [problem.base], {}))
        assert all(torch.equal(merged[name], tensor) for name, tensor in problem.base.items())

    def test_sparse_changes_are_all_taken(self) -> None:
        """Where three quarters of the entries are as before, median and quartiles are 0."""
        problem = self.problem((1024,))
        base = problem.base["t0"]
        expert = torch.where(torch.rand(base.shape, generator=torch.Generator().manual_seed(3)) < 0.2, base + 0.1, base)
        merged = merge(self.make(), Problem(problem.base, [{"t0": expert}], {}))
        assert torch.equal(merged["t0"], expert)

    def test_quartiles_of_a_large_tensor_are_exact(self) -> None:
        """Above a million elements upstream takes them of a random sample."""
        problem = self.problem((1100 * 1000,), torch.bfloat16)
        [(_, bound)] = self.make().prepare(lay_out(problem), {}, None)
        *_, expected = importances(problem.base["t0"], problem.experts[0]["t0"])
        assert bound == pytest.approx(expected, rel=1e-6)

    def test_more_than_one_expert_is_refused(self) -> None:
        problem = self.problem((5,))
        twice = Problem(problem.base, [*problem.experts, *problem.experts], {})
        with pytest.raises(InputError, match="expected one expert .*, found 2; name one"):
            self.make().prepare(lay_out(twice), {}, None)


@pytest.mark.parametrize(
    ("name", "checkpoints"), [("arcee_fusion_a", ("base", "v1")), ("arcee_fusion_b", ("v2", "v3"))]
)
def test_equals_mergekit(name: str, checkpoints: Sequence[str]) -> None:
    """mergekit's divergences, in float32, are off by up to a thousandth: entries that near to the bound may differ."""
    problem = golden_problem(name, {}, checkpoints)
    merged, num_apart = merge(ArceeFusion(), problem), 0
    for tensor, expected in reference(name).items():
        base, expert = problem.base[tensor], problem.experts[0][tensor]
        apart = differs(merged[tensor], expected, [base, expert])
        importance, _, bound = importances(base, expert)
        assert ((importance[apart] / bound - 1).abs() < 1e-3).all()
        num_apart += int(apart.sum())
        assert not torch.equal(expected, base)
    assert num_apart <= 2  # of some 14,000 whose entries changed
