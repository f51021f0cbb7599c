"""Partitioned task arithmetic against a twin that draws the classes with a plain implementation of the hash."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from operator_contract import DifferentiableContract, Problem, TwinResult, as_task_vectors, lay_out, matrix_shape, merge
from torch import Tensor
from trimmed_contract import draws

from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.operators.partitioned import Partitioned, PartitionedOptions

NUM_CLASSES = 3


def classes_of(name: str, shape: Sequence[int], num_experts: int, seed: int = 0) -> Tensor:
    """Ties of a trim are drawn in even steps; here the expert's number is only that of no expert."""
    size = int(torch.Size(shape).numel())
    drawn = draws(name, num_experts, size, seed) * NUM_CLASSES
    return drawn.long().view(*shape) if len(shape) == 2 else torch.zeros(*shape, dtype=torch.int64)


class TestPartitioned(DifferentiableContract):
    def make(self) -> Operator:
        return Partitioned(PartitionedOptions(classes=NUM_CLASSES))

    def shape(self, size: int) -> tuple[int, ...]:
        return matrix_shape(size)

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            spec.name: torch.rand((num_experts, num_tensors), generator=generator, dtype=torch.float64) * 1.4 - 0.2
            for spec in self.make().parameters
        }

    def exact(self, problem: Problem) -> dict[str, TwinResult]:
        results = {}
        for s, (name, base) in enumerate(problem.base.items()):
            classes = classes_of(name, base.shape, len(problem.experts))
            numbers = torch.stack([problem.values[spec.name][:, s] for spec in self.make().parameters])
            merged, magnitude = base.double(), base.double().abs() * (1 + numbers.abs().sum())
            for k, expert in enumerate(problem.experts):
                weights = numbers[:, k][classes]
                merged = merged + weights * (expert[name].double() - base.double())
                # In the entries of other classes the base itself is weighed, and taken off again.
                magnitude = magnitude + numbers[:, k].abs().sum() * (expert[name].double().abs() + base.double().abs())
            results[name] = TwinResult(merged, NUM_CLASSES * magnitude, torch.zeros_like(base, dtype=torch.bool))
        return results

    def test_every_entry_is_of_one_class_as_likely_as_any_other(self) -> None:
        problem = self.problem((90_000,), num_experts=2)
        operator = self.make()
        kept = operator.prepare(lay_out(problem), problem.values, None).experts
        moved = torch.stack([expert.buffer_P[:90_000] != problem.base["t0"].flatten() for expert in kept])
        assert (moved.view(NUM_CLASSES, 2, -1).sum(0) == 1).all()
        assert (moved.float().mean(1) - 1 / NUM_CLASSES).abs().max() < 0.01

    def test_equal_coefficients_are_task_arithmetic(self) -> None:
        problem = self.problem((1024, 35), torch.bfloat16)
        equal = dict.fromkeys(problem.values, problem.values["coefficient"])
        plain = replace(problem, values={"coefficient": problem.values["coefficient"]})
        merged, expected = merge(self.make(), replace(problem, values=equal)), merge(TaskArithmetic(), plain)
        for name in merged:
            torch.testing.assert_close(merged[name], expected[name], rtol=2**-7, atol=1e-6)

    def test_vectors_have_one_class(self) -> None:
        operator, generator = self.make(), torch.Generator().manual_seed(0)
        base, moved = (torch.randn(7, generator=generator) for _ in range(2))
        values = {spec.name: torch.zeros(1, 1, dtype=torch.float64) for spec in operator.parameters}
        values["coefficient"] += 1
        assert torch.allclose(merge(operator, Problem({"t": base}, [{"t": moved}], values))["t"], moved, atol=1e-6)

    @pytest.mark.parametrize("form", ["task vectors", "int8"])
    def test_task_vectors_are_split_as_they_are_held(self, form: str) -> None:
        problem = self.problem((1024,), num_experts=2)
        sources, operator = lay_out(problem), self.make()
        held = as_task_vectors(sources, form)
        state = operator.prepare(held, problem.values, None)
        for k in range(2):
            whole = sum(state.task_vector(2 * number + k, 0) for number in range(NUM_CLASSES))
            torch.testing.assert_close(whole, held.task_vector(k, 0))
