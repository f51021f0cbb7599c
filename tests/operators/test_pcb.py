"""PCB-Merging against its formula, over the whole model."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from operator_contract import DifferentiableContract, Problem, TwinResult, lay_out, merge
from torch import Tensor

from evomerge.operators.operator import Operator
from evomerge.operators.pcb import Pcb


def scaled(numbers: Tensor, low: float, high: float) -> Tensor:
    return (numbers - low) / (high - low) if high > low else torch.zeros_like(numbers)


class TestPcb(DifferentiableContract):
    # The balanced task vectors, 0.1 an entry, are held in bfloat16: 2^-9 of them by thousands of random gradients of 1.
    gradient_tolerance = 0.1
    most_undecided = 1.1  # the entry at the threshold may be a whole tensor

    def make(self) -> Operator:
        return Pcb()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Each tensor has a ratio of its own."""
        uniform = torch.rand(num_experts + 1, num_tensors, generator=generator, dtype=torch.float64)
        return {"coefficient": 0.5 + uniform[1:], "ratio": 0.02 + 0.4 * uniform[:1]}

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        raise NotImplementedError

    def exact(self, problem: Problem) -> dict[str, TwinResult]:
        """All tensors together, as one vector an expert."""
        base = torch.cat([tensor.flatten().double() for tensor in problem.base.values()])
        vectors = torch.stack(
            [
                torch.cat([(e[name].float() - t.float()).flatten().double() for name, t in problem.base.items()])
                for e in problem.experts
            ]
        )
        num, num_experts = len(base), len(vectors)
        clamped, heights = vectors.clone(), vectors.clone()
        for k, vector in enumerate(vectors):
            ordered = vector.abs().sort().values
            first = int(num * 0.01)
            low, high = float(ordered[first]), float(ordered[max(int(num * 0.99) - 1, first)])
            clamped[k] = vector.sign() * vector.abs().clamp(low, high)
            heights[k] = scaled(clamped[k].abs(), low, high)
        agreement = (vectors.sign() * heights).sum(0)
        sizes = [tensor.numel() for tensor in problem.base.values()]
        ratios = problem.values["ratio"][0].detach().repeat_interleave(torch.tensor(sizes))
        balance, error = torch.zeros_like(vectors), torch.zeros_like(vectors)
        for k, vector in enumerate(vectors):
            score = (num_experts * heights[k] ** 2).exp() * (vector * agreement).tanh()
            ordered = score.sort().values
            low = ordered[(num * (1 - ratios)).long().clamp(max=num - 1)]
            spread = float(ordered[-1]) - low
            balance[k] = torch.where(spread > 0, (score - low) / spread, 0.0).clamp(min=0.0)
            # What float32 does to a score: it scales with the terms of the agreement, and all that are summed with it.
            terms = (num_experts * heights[k] ** 2).exp() * (vector * heights.sum(0)).abs() + low.abs()
            error[k] = torch.where((score > low - 1e-5 * terms) & (spread > 0), terms / spread, 0.0)
        total = balance.sum(0).clamp(min=1e-12)
        coefficients = torch.stack([c.repeat_interleave(torch.tensor(sizes)) for c in problem.values["coefficient"]])
        held = coefficients * clamped * balance / total
        unsure = (coefficients * clamped).abs().sum(0) * error.sum(0) / total
        # Where all balances are nearly 0 they may come out as 0: then nothing of the experts is taken.
        undecided = unsure > 1e4
        merged, magnitude = base + held.sum(0), base.abs() + held.abs().sum(0) + 8 * unsure
        parts = zip(*(x.split(sizes) for x in (merged, magnitude, undecided, held.abs().sum(0))), strict=True)
        return {name: TwinResult(*part) for name, part in zip(problem.base, parts, strict=True)}

    @pytest.mark.parametrize("ratio", [0.0, 1.0])
    def test_a_ratio_at_the_edge_is_defined(self, ratio: float) -> None:
        """0 keeps nothing; 1 all but the smallest."""
        problem = self.problem((1030,), num_experts=2)
        values = {**problem.values, "ratio": torch.full((1, 1), ratio, dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, values))["t0"]
        changed = (merged != problem.base["t0"]).double().mean()
        assert changed == 0.0 if ratio == 0.0 else changed > 0.99

    def test_experts_that_are_the_base_give_the_base(self) -> None:
        problem = self.problem((1030,), torch.bfloat16, num_experts=2)
        merged = merge(self.make(), Problem(problem.base, [problem.base, problem.base], problem.values))
        assert torch.equal(merged["t0"], problem.base["t0"])

    def test_preparing_again_gives_what_preparing_gives(self) -> None:
        problem, operator = self.problem((1025, 900)), self.make()
        sources = lay_out(problem)
        other = {**problem.values, "ratio": problem.values["ratio"] / 2}
        fresh = operator.prepare(sources, other, None).directions
        again = operator.prepare(sources, other, operator.prepare(sources, problem.values, None)).directions
        for one, two in zip(fresh.experts, again.experts, strict=True):
            assert torch.equal(one.buffer_P, two.buffer_P)

    def test_only_the_asked_share_of_the_whole_model_is_kept(self) -> None:
        """One expert: the tensor that moved farther keeps nearly all of what is kept."""
        generator = torch.Generator().manual_seed(0)
        base = {"a": torch.zeros(4000), "b": torch.zeros(4000)}
        expert = {"a": torch.randn(4000, generator=generator), "b": 0.1 * torch.randn(4000, generator=generator)}
        values = {
            name: torch.full((1, 2), value, dtype=torch.float64)
            for name, value in (("coefficient", 1.0), ("ratio", 0.05))
        }
        merged = merge(self.make(), Problem(base, [expert], values))
        assert int((merged["a"] != 0).sum()) == pytest.approx(400, abs=2)
        assert not merged["b"].any()
