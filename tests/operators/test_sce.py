"""SCE against its formula, mergekit's convention and FuseAI's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from golden import assert_equals_mergekit, golden_problem
from operator_contract import SEVERAL_CHUNKS, OperatorContract, Problem, TwinResult, lay_out, merge
from torch import Tensor

from evomerge.kernels.tiles import variance
from evomerge.operators.operator import Operator
from evomerge.operators.sce import Sce, SceOptions


def selected(vectors: Tensor, topk: float) -> tuple[Tensor, Tensor]:
    """By sorting: the share of each entry that is kept, and whether entries tie for the last place."""
    if topk == 1.0:
        return torch.ones(vectors.shape[1:]).double(), torch.zeros(vectors.shape[1:], dtype=torch.bool)
    variances = variance(list(vectors))
    num_kept = int(topk * int((variances > 0).sum()))
    if num_kept == 0:
        return torch.zeros(variances.shape).double(), torch.zeros(variances.shape, dtype=torch.bool)
    last = variances.flatten().sort(descending=True).values[num_kept - 1]
    num_above, ties = int((variances > last).sum()), variances == last
    share = (num_kept - num_above) / int(ties.sum())
    return torch.where(variances > last, 1.0, torch.where(ties, share, 0.0)).double(), ties & (share < 1)


class SceTwin(OperatorContract):
    most_undecided = 0.5  # two experts that moved by a few bfloat16 steps tie often
    options = SceOptions()

    def make(self) -> Operator:
        return Sce(self.options)

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        uniform = torch.rand(1, num_tensors, generator=generator, dtype=torch.float64)
        return {"select_topk": 0.1 + 0.8 * uniform}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        vectors = torch.stack([expert.float() - base.float() for expert in experts])
        share, undecided = selected(vectors, float(values["select_topk"][0]))
        vectors = vectors.double()
        squares = (vectors**2 * share).flatten(1).sum(1)
        equal = squares.sum() == 0 or squares.sum() / base.numel() < self.options.floor
        weights = torch.full_like(squares, 1 / len(experts)) if equal else squares / squares.sum()
        if self.options.masked == "merge":
            vectors = vectors * (share > 0)
        else:
            undecided = torch.zeros_like(undecided)
        total, spread = vectors.sum(0), vectors.abs().sum(0)
        agrees = vectors.sign() == torch.where(total >= 0, 1.0, -1.0)
        columns = weights.view(-1, *(1,) * base.ndim)
        divisor = (columns * agrees).sum(0)
        consensus = (columns * vectors * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)
        undecided = undecided | ((total.abs() <= len(experts) * 2.0**-23 * spread) & (spread > 0))
        return TwinResult(base.double() + consensus, base.double().abs() + spread, undecided)

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        """A table of a large tensor is not exact, unless all of it is kept; see below."""
        problem = super().problem(sizes, dtype, num_experts, seed)
        if tuple(sizes) != SEVERAL_CHUNKS:
            return problem
        return replace(problem, values={"select_topk": torch.ones(1, len(sizes), dtype=torch.float64)})


class TestSce(SceTwin):
    def test_numbers_worked_out_by_hand(self) -> None:
        base, values = {"t": torch.zeros(4)}, {"select_topk": torch.full((1, 1), 0.5, dtype=torch.float64)}
        experts = [{"t": torch.tensor([1.0, 0.1, 2.0, 0.3])}, {"t": torch.tensor([0.0, 0.2, -2.0, 0.3])}]
        # Three entries vary, one of them is kept; a tie in the election counts as positive.
        merged = merge(self.make(), Problem(base, experts, values))["t"]
        assert merged.tolist() == pytest.approx([0.0, 0.0, 2.0, 0.0])
        # Four vary, two are kept; there the squares are 1 + 4, 4 and 1.
        third = {"t": torch.tensor([0.0, 0.0, -1.0, 0.0])}
        merged = merge(self.make(), Problem(base, [*experts, third], values))["t"]
        assert merged.tolist() == pytest.approx([1.0, 0.0, (0.4 * -2 + 0.1 * -1) / 0.5, 0.0])

    def test_weights_do_not_depend_on_the_scale_of_the_updates(self) -> None:
        weights = [self.weights_of(size) for size in (1e-1, 1e-4)]
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-2, atol=0)
        assert weights[0][0] > 3 * weights[0][1]

    def weights_of(self, size: float) -> Tensor:
        """The weights of two experts of which one moved twice as far."""
        generator = torch.Generator().manual_seed(0)
        experts = [{"t": factor * size * torch.randn(2000, generator=generator)} for factor in (2, 1)]
        values = {"select_topk": torch.full((1, 1), 0.5, dtype=torch.float64)}
        operator = self.make()
        sources = lay_out(Problem({"t": torch.zeros(2000)}, experts, values))
        return operator.weights(values, operator.prepare(sources, values, None))[1:, 0]

    @pytest.mark.parametrize("topk", [0.1, 0.5])
    def test_a_large_tensor_keeps_the_asked_share_nearly(self, topk: float) -> None:
        """Of 263,644 elements 4,097 quantiles are held: off by some 8 entries, and their squares by as little."""
        problem = self.problem(SEVERAL_CHUNKS)
        values = {"select_topk": torch.full((1, 3), topk, dtype=torch.float64)}
        operator, sources = self.make(), lay_out(problem)
        state = operator.prepare(sources, values, None)
        vectors = torch.stack([expert["t1"] - problem.base["t1"] for expert in problem.experts])
        share, _ = selected(vectors, topk)
        squares = (vectors.double() ** 2 * share).sum(1)
        torch.testing.assert_close(state.weights_KS[:, 1], squares / squares.sum(), rtol=1e-4, atol=0)
        merged = merge(operator, replace(problem, values=values))
        num_kept = int((merged["t1"] != problem.base["t1"]).sum())
        assert num_kept == pytest.approx(int(topk * vectors.shape[1]), abs=40)

    def test_sorted_variances_are_used_again(self) -> None:
        problem, operator = self.problem((1025, 900)), self.make()
        sources = lay_out(problem)
        other = {"select_topk": problem.values["select_topk"] / 2}
        first = operator.prepare(sources, problem.values, None)
        again, fresh = operator.prepare(sources, other, first), operator.prepare(sources, other, None)
        assert again.tables is first.tables
        assert torch.equal(again.weights_KS, fresh.weights_KS)
        assert torch.equal(again.trims.low_KS, fresh.trims.low_KS)


class TestMergekitsFloor(SceTwin):
    options = SceOptions(floor=1e-6)

    @pytest.mark.parametrize(("size", "equal"), [(6e-4, True), (2e-3, False)])
    def test_small_updates_are_not_told_apart(self, size: float, equal: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        experts = [{"t": factor * size * torch.randn(2000, generator=generator)} for factor in (1.0, 0.5, 0.25)]
        values = {"select_topk": torch.ones(1, 1, dtype=torch.float64)}
        operator = self.make()
        sources = lay_out(Problem({"t": torch.zeros(2000)}, experts, values))
        weights = operator.weights(values, operator.prepare(sources, values, None))[1:, 0]
        expected = torch.full((3,), 1 / 3) if equal else torch.tensor([16, 4, 1]) / 21
        torch.testing.assert_close(weights, expected.double(), rtol=0.1, atol=0)


class TestFuseAisMask(SceTwin):
    options = SceOptions(masked="weights")

    def test_what_is_not_selected_is_merged_too(self) -> None:
        problem = self.problem((1025,), num_experts=2)
        values = {"select_topk": torch.full((1, 1), 0.1, dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, values))["t0"]
        assert (merged != problem.base["t0"]).double().mean() > 0.99


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_equals_mergekit(floor: float) -> None:
    """The reference's updates are large (0.02): mergekit's floor, 1e-6, is not reached."""
    problem = golden_problem("sce_a", {"select_topk": 0.5})
    assert_equals_mergekit("sce_a", problem, merge(Sce(SceOptions(floor=floor)), problem))
