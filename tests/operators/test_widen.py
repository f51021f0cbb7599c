"""WIDEN against its definition: ranks counted one by one, scores column by column."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
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

from evomerge.operators.operator import Operator
from evomerge.operators.widen import Widen


def ranks(changes: Sequence[float]) -> list[int]:
    """Each one's place in ascending order; of equal ones the first comes first."""
    order = sorted(range(len(changes)), key=lambda i: changes[i])
    return [order.index(i) for i in range(len(changes))]


def nearly_tied(changes: Sequence[float]) -> list[bool]:
    """Where rounding in float64 decides the order."""
    ordered = sorted(changes)
    near = [other - one < 1e-9 * ordered[-1] for one, other in pairwise(ordered)]
    either = [one or other for one, other in zip([*near, False], [False, *near], strict=True)]
    return [either[rank] for rank in ranks(changes)]


def scores(changes_KV: Sequence[Sequence[float]], t: float, s: float) -> Tensor:
    """Return (K, V): softmax across experts of rank / V, or s above t times the mean rank."""
    size = len(changes_KV[0])
    ranks_KV = torch.tensor([ranks(changes) for changes in changes_KV], dtype=torch.float64)
    return torch.where(ranks_KV > t * (size - 1) / 2, s, (ranks_KV / size).softmax(dim=0))


def length_changes(base: Sequence[Tensor], expert: Sequence[Tensor]) -> list[float]:
    return [float((one.norm() - other.norm()).abs()) for one, other in zip(expert, base, strict=True)]


def turns(base: Sequence[Tensor], expert: Sequence[Tensor]) -> list[float]:
    pairs = zip(expert, base, strict=True)
    return [float(1 - (one * other).sum() / (one.norm() * other.norm())) for one, other in pairs]


class TestWiden(OperatorContract):
    shape = staticmethod(matrix_shape)

    def make(self) -> Operator:
        return Widen()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        t, s = torch.rand((2, 1, num_tensors), generator=generator, dtype=torch.float64)
        return {"t": 0.3 + 1.4 * t, "s": 0.2 + s}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        t, s = float(values["t"][0]), float(values["s"][0])
        if base.ndim == 1:
            changes = [[(expert.float() - base.float()).abs().tolist() for expert in experts]]
            undecided = torch.zeros(base.shape, dtype=torch.bool)
        else:
            origin, *moved = ([line.double() for line in lines_of(tensor, "columns")] for tensor in (base, *experts))
            changes = [[measure(origin, held) for held in moved] for measure in (length_changes, turns)]
            near = torch.tensor([[nearly_tied(row) for row in rows] for rows in changes]).any(0).any(0)
            undecided = near.expand(base.shape)
        weights = torch.stack([scores(rows, t, s) for rows in changes]).mean(0)
        merged, magnitude = base.double(), base.double().abs()
        for weight, expert in zip(weights, experts, strict=True):  # a row of columns' weights broadcasts over rows
            merged = merged + weight * (expert.double() - base.double())
            magnitude = magnitude + weight * (expert.double().abs() + base.double().abs())
        return TwinResult(merged, magnitude, undecided)

    @given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6), t=st.floats(0, 2))
    @inherited
    def test_one_expert_alone_is_taken_whole(self, dtype: torch.dtype, seed: int, t: float) -> None:
        """A softmax over one is 1, and so is the score of what matters."""
        problem = self.problem((1, 7, 12, 1030), dtype, num_experts=1, seed=seed)
        values = {"t": torch.full((1, 4), t, dtype=torch.float64), "s": torch.ones(1, 4, dtype=torch.float64)}
        merged = merge(self.make(), replace(problem, values=values))
        assert all(torch.equal(merged[name], tensor) for name, tensor in problem.experts[0].items())

    def test_the_mean_rank_itself_is_not_above_it(self) -> None:
        """Of three columns at t = 1 only the last in rank counts, whatever a third and two thirds round to."""
        base = {"t0": torch.ones(3)}
        experts = [{"t0": torch.tensor([1.1, 1.2, 1.3])}, {"t0": torch.tensor([1.3, 1.2, 1.1])}]
        values = {"t": torch.ones(1, 1, dtype=torch.float64), "s": torch.ones(1, 1, dtype=torch.float64)}
        merged = merge(self.make(), Problem(base, experts, values))["t0"]
        low = float(torch.tensor([0.0, 2 / 3]).softmax(0)[0])  # against the other expert's highest rank
        expected = torch.tensor([1.3 + 0.1 * low, 1.2, 1.3 + 0.1 * low])
        torch.testing.assert_close(merged, expected)

    def test_embeddings_go_by_row(self) -> None:
        problem = self.problem((48,), num_experts=2)
        base, *experts = problem.base["t0"], *(expert["t0"] for expert in problem.experts)
        assert base.ndim == 2
        name = "model.embed_tokens.weight"
        turned = Problem({name: base}, [{name: expert} for expert in experts], problem.values)
        plain = Problem({"t0": base.T.contiguous()}, [{"t0": e.T.contiguous()} for e in experts], problem.values)
        assert torch.equal(merge(self.make(), turned)[name], merge(self.make(), plain)["t0"].T)
        assert not torch.equal(merge(self.make(), turned)[name], merge(self.make(), problem)["t0"])

    def test_columns_that_were_zero_or_did_not_move_have_a_rank(self) -> None:
        base = {"t0": torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}
        expert = {"t0": torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}
        state = Widen().prepare(lay_out(Problem(base, [expert], {})), {"t": torch.ones(1, 1)}, None)
        assert state.ranks[0].tolist() == [[[2, 0, 1]], [[2, 0, 1]]]

    def test_another_cut_off_ranks_nothing_anew(self) -> None:
        problem = self.problem((12, 7))
        sources = lay_out(problem)
        state = self.make().prepare(sources, problem.values, None)
        other = self.make().prepare(sources, {"t": problem.values["t"] / 2, "s": problem.values["s"]}, state)
        assert other.ranks is state.ranks
        assert torch.equal(other.t_S, problem.values["t"][0] / 2)
