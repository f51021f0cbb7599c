"""RAM and RAM+ against their formulas and mergekit."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from golden import assert_equals_mergekit, golden_problem
from operator_contract import OperatorContract, Problem, TwinResult, lay_out, merge
from torch import Tensor

from evomerge.operators.operator import Operator
from evomerge.operators.ram import Ram, RamPlusTl


class RamTwin(OperatorContract):
    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        vectors = torch.stack([(expert.float() - base.float()).double() for expert in experts])
        changed = vectors.abs() > float(values["epsilon"].float()[0])
        count = changed.sum(0)
        merged = base.double()
        for vector, mine in zip(vectors, changed, strict=True):
            shared, own = int((mine & (count > 1)).sum()), int((mine & (count == 1)).sum())
            gain = self.gain(shared / own, values) if own else 1.0
            merged = merged + torch.where(mine & (count == 1), gain * vector, 0.0)
            merged = merged + torch.where(mine & (count > 1), vector / count, 0.0)
        magnitude = base.double().abs() + 2 * vectors.abs().sum(0)
        return TwinResult(merged, magnitude, torch.zeros_like(changed[0]))

    def gain(self, ratio: float, values: Mapping[str, Tensor]) -> float:
        raise NotImplementedError

    def one(self, vectors: Sequence[Sequence[float]], **values: float) -> list[float]:
        """Merge task vectors of one small tensor over a base of zeros."""
        matrices = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in values.items()}
        experts = [{"t": torch.tensor(vector)} for vector in vectors]
        merged: list[float] = merge(self.make(), Problem({"t": torch.zeros(len(vectors[0]))}, experts, matrices))[
            "t"
        ].tolist()
        return merged


class TestRam(RamTwin):
    def make(self) -> Operator:
        return Ram()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Around the size of the task vectors, 0.1."""
        return {"epsilon": 0.2 * torch.rand(1, num_tensors, generator=generator, dtype=torch.float64)}

    def gain(self, ratio: float, values: Mapping[str, Tensor]) -> float:
        return 1.0

    def test_numbers_worked_out_by_hand(self) -> None:
        """Changed by one, by two and by none."""
        assert self.one([[0.5, 0.5, 0.01], [0.0, -0.25, 0.0]], epsilon=0.1) == [0.5, 0.125, 0.0]


class TestRamPlusTl(RamTwin):
    def make(self) -> Operator:
        return RamPlusTl()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Epsilons of which some leave most entries to one expert, so that shared / own lies below alpha."""
        r, alpha, epsilon = torch.rand(3, 1, num_tensors, generator=generator, dtype=torch.float64)
        return {"r": 0.1 + r, "alpha": 2 * alpha, "epsilon": 0.3 * epsilon}

    def gain(self, ratio: float, values: Mapping[str, Tensor]) -> float:
        return 1.0 + float(values["r"][0]) * min(ratio, float(values["alpha"][0]))

    @pytest.mark.parametrize(("alpha", "gain"), [(0.2, 1 + 0.5 * 0.2), (9.0, 1 + 0.5 / 2)])
    def test_numbers_worked_out_by_hand(self, alpha: float, gain: float) -> None:
        """The first expert has two entries of its own and shares one; the second has none of its own."""
        merged = self.one([[0.5, 1.0, 0.5], [0.0, 0.0, -0.25]], r=0.5, alpha=alpha, epsilon=0.1)
        assert merged == pytest.approx([0.5 * gain, gain, 0.125])

    def test_only_the_tensors_whose_epsilon_changed_are_counted_again(self) -> None:
        problem, operator = self.problem((1025, 900)), self.make()
        sources = lay_out(problem)
        changed = {**problem.values, "epsilon": problem.values["epsilon"] + torch.tensor([[0.0, 0.05]])}
        first = operator.prepare(sources, problem.values, None)
        fresh = operator.prepare(sources, changed, None)
        first.ratios_KS[0, 0] = 77.0
        again = operator.prepare(sources, changed, first)
        assert again.ratios_KS[0, 0] == 77.0
        assert torch.equal(again.ratios_KS[:, 1], fresh.ratios_KS[:, 1])


@pytest.mark.parametrize(
    ("name", "operator", "values"),
    [("ram_a", Ram(), {"epsilon": 1e-5}), ("ramplus_tl_a", RamPlusTl(), {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5})],
)
def test_equals_mergekit(name: str, operator: Operator, values: Mapping[str, float]) -> None:
    """In the reference every expert's shared / own is above alpha: of the ratio this tests the clipped value alone."""
    problem = golden_problem(name, values)
    assert_equals_mergekit(name, problem, merge(operator, problem))
