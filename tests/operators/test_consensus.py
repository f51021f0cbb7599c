"""Consensus Task Arithmetic against its formula."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from operator_contract import DifferentiableContract, Problem, TwinResult, lay_out, merge
from torch import Tensor

from evomerge.errors import InputError
from evomerge.operators.consensus import Consensus, ConsensusOptions
from evomerge.operators.operator import Operator


class ConsensusTwin(DifferentiableContract):
    k: int
    # The masked sum, 0.2 an entry, is held in bfloat16: 2^-9 of it by up to 262,144 random gradients of 1.
    gradient_tolerance = 0.5

    def make(self) -> Operator:
        return Consensus(ConsensusOptions(k=self.k))

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        uniform = torch.rand(num_experts + 1, num_tensors, generator=generator, dtype=torch.float64)
        return {"scale": 0.1 + uniform[:1], "threshold": 0.2 + uniform[1:]}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        vectors = [(expert.float() - base.float()).double() for expert in experts]
        total, size = sum(vectors, torch.zeros(base.shape).double()), torch.stack(vectors).abs().sum(0)
        needed, undecided = torch.zeros(base.shape), torch.zeros(base.shape, dtype=torch.bool)
        for vector, threshold in zip(vectors, values["threshold"].detach(), strict=True):
            others = threshold * (total - vector).abs()
            needed += vector.abs() > others
            undecided |= (vector.abs() - others).abs() < 1e-6 * size
        held = torch.where(needed >= self.k, total, 0.0)
        scale = values["scale"][0]
        magnitude = base.double().abs() + (scale * size).abs()
        return TwinResult(base.double() + scale * held, magnitude, undecided, (scale * held).abs())

    def one(self, vectors: Sequence[Sequence[float]], threshold: float) -> list[float]:
        """Merge task vectors of one small tensor over a base of zeros."""
        values = {
            "scale": torch.ones(1, 1, dtype=torch.float64),
            "threshold": torch.full((len(vectors), 1), threshold, dtype=torch.float64),
        }
        experts = [{"t": torch.tensor(vector)} for vector in vectors]
        merged: list[float] = merge(self.make(), Problem({"t": torch.zeros(len(vectors[0]))}, experts, values))[
            "t"
        ].tolist()
        return merged

    def test_only_the_tensors_whose_thresholds_changed_are_masked_again(self) -> None:
        problem, operator = self.problem((1025, 900, 5)), self.make()
        sources = lay_out(problem)
        changed = {**problem.values, "threshold": problem.values["threshold"].clone()}
        changed["threshold"][1, 1] += 0.2
        first = operator.prepare(sources, problem.values, None)
        held_P = first.directions.experts[0].buffer_P
        held_P[0] = 77.0
        again = operator.prepare(sources, changed, first).directions.experts[0].buffer_P
        fresh = operator.prepare(sources, changed, None).directions.experts[0].buffer_P
        assert again[0] == 77.0
        assert torch.equal(again[1:], fresh[1:])


class TestWhatOneTaskNeeds(ConsensusTwin):
    k = 1

    def test_numbers_worked_out_by_hand(self) -> None:
        """Alike; one alone; one against a larger one: 0.2 > 0.5 * 0.5 does not hold, 0.5 > 0.5 * 0.2 does."""
        merged = self.one([[0.5, 0.5, 0.5, 0.0], [0.5, 0.0, -0.2, 0.0]], threshold=0.5)
        assert merged == pytest.approx([1.0, 0.5, 0.3, 0.0])


class TestWhatTwoTasksNeed(ConsensusTwin):
    k = 2
    fewest = 2

    def test_numbers_worked_out_by_hand(self) -> None:
        """As above: what one task alone needs is dropped."""
        merged = self.one([[0.5, 0.5, 0.5, 0.0], [0.5, 0.0, -0.2, 0.0]], threshold=0.5)
        assert merged == pytest.approx([1.0, 0.0, 0.0, 0.0])

    def test_more_than_there_are_experts_is_refused(self) -> None:
        problem = self.problem((5,))
        alone = Problem(problem.base, problem.experts[:1], {**problem.values, "threshold": torch.ones(1, 1).double()})
        with pytest.raises(InputError, match="k: expected at most the number of experts, 1, found 2"):
            self.make().prepare(lay_out(alone), alone.values, None)
