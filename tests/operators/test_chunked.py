"""Chunked task arithmetic against a twin that cuts tensors by hand; which tensors are cut, where, and at what cost."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from operator_contract import DifferentiableContract, Problem, TwinResult, as_task_vectors, lay_out, merge
from torch import Tensor

from evomerge.kernels.layout import BLOCK
from evomerge.kernels.lincomb import task_vector_products
from evomerge.operators.chunked import Chunked, ChunkedOptions
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator

MOST, BUDGET, KAPPA, START = 3, 2.5, 0.5, 0.25


def numbers_of_chunks(problem: Problem) -> dict[str, int]:
    """By the paper's formula, with coefficients of 1."""
    importance = {
        name: sum(float((expert[name].double() - base.double()).abs().sum()) for expert in problem.experts)
        for name, base in problem.base.items()
    }
    powers = {name: (one / sum(importance.values())) ** KAPPA for name, one in importance.items()}
    whole = {name: int(BUDGET * len(powers) * power / sum(powers.values())) for name, power in powers.items()}
    return {name: min(whole[name], MOST, -(-base.numel() // BLOCK)) for name, base in problem.base.items()}


def chunks_of(size: int, number: int) -> Tensor:
    """The chunk of every entry, of as many blocks as another or one more."""
    blocks = torch.arange(-(-size // BLOCK))
    return (blocks * number // len(blocks)).repeat_interleave(BLOCK)[:size]


def evenly_moved(magnitudes: Mapping[str, float], num_blocks: int = 8) -> Problem:
    base = {name: torch.zeros(num_blocks * BLOCK) for name in magnitudes}
    expert = {name: torch.full((num_blocks * BLOCK,), size) for name, size in magnitudes.items()}
    values = {f"coefficient{number}": torch.zeros(1, len(base), dtype=torch.float64) for number in ("", 2, 3, 4)}
    return Problem(base, [expert], values)


class TestChunked(DifferentiableContract):
    def make(self) -> Operator:
        return Chunked(ChunkedOptions(chunks=MOST, budget=BUDGET, kappa=KAPPA, start=START))

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            spec.name: torch.rand((num_experts, num_tensors), generator=generator, dtype=torch.float64) * 1.4 - 0.2
            for spec in self.make().parameters
        }

    def exact(self, problem: Problem) -> dict[str, TwinResult]:
        results, numbers = {}, numbers_of_chunks(problem)
        for s, (name, base) in enumerate(problem.base.items()):
            given = torch.stack([problem.values[spec.name][:, s] for spec in self.make().parameters])
            if numbers[name] == 0:
                given = torch.full_like(given, START)
            chunks = chunks_of(base.numel(), max(1, numbers[name])).view(base.shape)
            merged, magnitude = base.double(), base.double().abs()
            for k, expert in enumerate(problem.experts):
                weights = given[:, k][chunks]
                merged = merged + weights * (expert[name].double() - base.double())
                magnitude = magnitude + weights.abs() * (expert[name].double().abs() + base.double().abs())
            results[name] = TwinResult(merged, magnitude, torch.zeros_like(base, dtype=torch.bool))
        return results

    def test_the_problems_of_the_contract_have_all_kinds_of_tensors(self) -> None:
        sizes = (1, 1023, 1024, 1025, 7, 9000)
        assert list(numbers_of_chunks(self.problem(sizes)).values()) == [0, 1, 1, 2, 0, 3]

    def test_equal_coefficients_are_task_arithmetic(self) -> None:
        problem = self.problem((3, 1025, 9000), torch.bfloat16)
        equal = torch.full_like(problem.values["coefficient"], START)
        merged = merge(self.make(), replace(problem, values=dict.fromkeys(problem.values, equal)))
        expected = merge(TaskArithmetic(), replace(problem, values={"coefficient": equal}))
        for name in merged:
            torch.testing.assert_close(merged[name], expected[name], rtol=2**-7, atol=1e-6)

    def test_an_expert_at_1_in_all_chunks_is_that_expert_bit_for_bit(self) -> None:
        problem = self.problem((1025, 9000), torch.bfloat16, num_experts=2)
        alone = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 2)
        merged = merge(self.make(), replace(problem, values=dict.fromkeys(problem.values, alone)))
        assert all(torch.equal(merged[name], problem.experts[1][name]) for name in merged)

    def test_where_a_tensor_has_no_chunk_no_coefficient_moves_it(self) -> None:
        problem = self.problem((9000, 3))
        assert list(numbers_of_chunks(problem).values()) == [MOST, 0]
        gradient = {name: torch.ones_like(base) for name, base in problem.base.items()}
        slopes = self._gradient(problem, gradient)
        for name in problem.values:
            assert (slopes[name][:, 0] != 0).all()
            assert (slopes[name][:, 1] == 0).all()
        start = torch.full_like(problem.values["coefficient"], START)
        expected = merge(TaskArithmetic(), replace(problem, values={"coefficient": start}))
        torch.testing.assert_close(merge(self.make(), problem)["t1"], expected["t1"])

    def test_nothing_is_copied_and_the_slopes_of_missing_chunks_are_0(self) -> None:
        problem = self.problem((9000, 1025), num_experts=2)
        sources, operator = lay_out(problem), Chunked(ChunkedOptions(chunks=4, budget=4.0, kappa=0.0))
        directions = operator.directions(sources, operator.prepare(sources, problem.values, None))
        buffers = [[expert.buffer_P for expert in held.experts] for held in (sources, directions)]  # type: ignore[union-attr]
        assert all(one is other for one, other in zip(buffers[0] * 4, buffers[1], strict=True))
        products = task_vector_products(torch.ones(1025), directions, 1)
        assert [bool(product != 0) for product in products] == [True] + [True] * 4 + [False] * 4

    @pytest.mark.parametrize("form", ["task vectors", "int8"])
    def test_task_vectors_are_cut_as_they_are_held(self, form: str) -> None:
        problem = self.problem((9000,), num_experts=2)
        sources, operator = lay_out(problem), self.make()
        assert isinstance(operator, Chunked)
        held = as_task_vectors(sources, form)
        state = operator.prepare(held, problem.values, None)
        for k in range(2):
            parts = torch.stack([state.directions.task_vector(2 * number + k, 0) for number in range(MOST)])
            torch.testing.assert_close(parts.sum(0), held.task_vector(k, 0))
            assert ((parts != 0).sum(0) <= 1).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ChunkedOptions(budget=2.0), [0, 1, 3]),  # 6 times 1/8, 2/8, 5/8
        (ChunkedOptions(budget=2.0, kappa=0.0), [2, 2, 2]),
        (ChunkedOptions(budget=2.0, kappa=2.0), [0, 0, 4]),  # 6 times 1/30, 4/30, 25/30, at most 4
        (ChunkedOptions(budget=30.0, chunks=9), [8, 8, 8]),  # no more than blocks
    ],
)
def test_the_tensors_that_matter_most_have_the_most_chunks(options: ChunkedOptions, expected: list[int]) -> None:
    problem = evenly_moved({"a": 1.0, "b": 2.0, "c": 5.0})
    assert Chunked(options).prepare(lay_out(problem), problem.values, None).num_chunks_S.tolist() == expected


def test_importance_is_that_of_all_experts_and_entries() -> None:
    """A tensor that moves twice as far but has a quarter of the entries, and one that only the other expert moves."""
    sizes = {"long": 8 * BLOCK, "short": 2 * BLOCK, "others": 4 * BLOCK}
    base = {name: torch.zeros(size) for name, size in sizes.items()}
    moved = [{"long": 1.0, "short": -2.0, "others": 0.0}, {"long": 0.0, "short": 0.0, "others": 2.0}]
    experts = [{name: torch.full_like(base[name], by) for name, by in each.items()} for each in moved]
    problem = Problem(base, experts, {})
    state = Chunked(ChunkedOptions(budget=5 / 3)).prepare(lay_out(problem), problem.values, None)
    assert state.num_chunks_S.tolist() == [2, 1, 2]  # 5 times 8/20, 4/20, 8/20


def test_chunks_are_contiguous_and_as_long_as_blocks_allow() -> None:
    problem = evenly_moved({"a": 1.0, "b": 2.0, "c": 5.0})
    numbers = {"": 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    values = {f"coefficient{n}": torch.full((1, 3), value, dtype=torch.float64) for n, value in numbers.items()}
    merged = merge(Chunked(ChunkedOptions(budget=2.0, start=0.5)), replace(problem, values=values))
    by_block = {
        name: (tensor.view(8, BLOCK) / expert).unique(dim=1).flatten().tolist()
        for (name, tensor), expert in zip(merged.items(), (1.0, 2.0, 5.0), strict=True)
    }
    assert by_block == {"a": [0.5] * 8, "b": [1.0] * 8, "c": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]}


def test_experts_that_are_the_base_are_not_cut() -> None:
    problem = evenly_moved({"a": 0.0, "b": 0.0})
    assert not any(tensor.any() for tensor in merge(Chunked(), problem).values())
