"""TIES in mergekit's convention: trim per tensor, elect after weighting, combine what agrees."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_contract import OperatorContract, Problem, TwinResult, lay_out, merge
from torch import Tensor

from evomerge.operators.operator import Operator
from evomerge.operators.ties import Ties, TiesOptions, keep_largest


def trim(vector: Tensor, density: float) -> Tensor:
    """Keep the ``max(1, int(density * n))`` largest magnitudes, the earlier one of equals: by sorting."""
    num_kept = min(len(vector), max(1, int(density * len(vector))))
    by_size = vector.abs().argsort(descending=True, stable=True)
    trimmed = torch.zeros(len(vector), dtype=torch.float64)
    trimmed[by_size[:num_kept]] = vector[by_size[:num_kept]].double()
    return trimmed


class TiesTwin(OperatorContract):
    normalized: bool

    def make(self) -> Operator:
        return Ties(TiesOptions(normalize=self.normalized))

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        def draw(rows: int, low: float, high: float) -> Tensor:
            uniform = torch.rand((rows, num_tensors), generator=generator, dtype=torch.float64)
            return low + (high - low) * uniform

        return {
            "coefficient": draw(num_experts, 0.1, 1.0),
            "density": draw(num_experts, 0.05, 1.0),
            "scale": draw(1, 0.3, 2.0),
        }

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        trimmed = [
            trim(expert.float() - base.float(), float(density))
            for expert, density in zip(experts, values["density"], strict=True)
        ]
        weights = [float(weight) for weight in values["coefficient"].float()]
        weighted = torch.stack([weight * vector for weight, vector in zip(weights, trimmed, strict=True)])
        total, spread = weighted.sum(0), weighted.abs().sum(0)
        elected = torch.where(total >= 0, 1.0, -1.0).double()
        agrees = (weighted.sign() == elected) & (weighted != 0)
        consensus = torch.where(agrees, weighted, 0.0).sum(0)
        if self.normalized:
            divisor = torch.where(agrees, torch.tensor(weights, dtype=torch.float64)[:, None], 0.0).sum(0)
            consensus = consensus / torch.where(divisor == 0, 1.0, divisor)
        scale = float(values["scale"][0])
        magnitude = base.double().abs() + abs(scale) * torch.maximum(spread, consensus.abs())
        undecided = (total.abs() <= len(experts) * 2.0**-23 * spread) & (spread > 0)
        return TwinResult(base.double() + scale * consensus, magnitude, undecided)

    def one(self, vectors: Sequence[Sequence[float]], weights: Sequence[float], density: float = 1.0) -> list[float]:
        """Merge task vectors of one small tensor over a base of zeros."""
        size, num_experts = len(vectors[0]), len(vectors)
        values = {
            "coefficient": torch.tensor(weights, dtype=torch.float64)[:, None],
            "density": torch.full((num_experts, 1), density, dtype=torch.float64),
            "scale": torch.ones(1, 1, dtype=torch.float64),
        }
        experts = [{"t": torch.tensor(vector)} for vector in vectors]
        merged: list[float] = merge(self.make(), Problem({"t": torch.zeros(size)}, experts, values))["t"].tolist()
        return merged

    def test_it_says_that_it_is_not_differentiable(self) -> None:
        assert not self.make().differentiable

    def test_a_tie_in_the_election_counts_as_positive(self) -> None:
        assert self.one([[0.5, -0.5], [-0.5, 0.5]], [1.0, 1.0]) == [0.5, 0.5]

    def test_earlier_thresholds_are_reused_only_where_the_density_is_the_same(self) -> None:
        problem = self.problem((900, 1030), torch.bfloat16, num_experts=2)
        flat, operator = lay_out(problem), self.make()
        changed = {**problem.values, "density": problem.values["density"].clone()}
        changed["density"][1, 0] = 0.5
        first = operator.prepare(flat.base_P, flat.experts_KP, flat.segments, problem.values, None)
        fresh = operator.prepare(flat.base_P, flat.experts_KP, flat.segments, changed, None)
        reused = operator.prepare(flat.base_P, flat.experts_KP, flat.segments, changed, first)
        for name in ("densities_KS", "thresholds_KS", "cutoffs_KS", "thresholds_KB", "cutoffs_KB"):
            assert torch.equal(getattr(reused, name), getattr(fresh, name)), name
        assert not torch.equal(first.thresholds_KS, fresh.thresholds_KS)

    @pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
    def test_exactly_the_asked_share_of_a_rounded_task_vector_is_kept(self, density: float) -> None:
        """Where "at least the threshold" would keep a third for a fifth: bfloat16 weights moved by a hundredth."""
        generator = torch.Generator().manual_seed(0)
        base = (0.02 * torch.randn(5000, generator=generator)).bfloat16()
        moved = (base + 2e-4 * torch.randn(5000, generator=generator)).bfloat16()
        values = {
            "coefficient": torch.ones(1, 1, dtype=torch.float64),
            "density": torch.full((1, 1), density, dtype=torch.float64),
            "scale": torch.ones(1, 1, dtype=torch.float64),
        }
        merged = merge(self.make(), Problem({"t": base}, [{"t": moved}], values))["t"]
        num_moved = int((moved != base).sum())
        assert int((merged != base).sum()) == min(int(density * 5000), num_moved)
        assert torch.equal(merged[merged != base], moved[merged != base])


class TestTiesNormalized(TiesTwin):
    normalized = True

    def test_numbers_worked_out_by_hand(self) -> None:
        """tau = (.3, .2, -.1), w = (1, .5, 2): .3 + .1 - .2 > 0, so (.3 + .1) / (1 + .5)."""
        assert self.one([[0.3], [0.2], [-0.1]], [1.0, 0.5, 2.0]) == pytest.approx([0.4 / 1.5])

    def test_negative_coefficients_are_out_of_range(self) -> None:
        """The divisor of weights of both signs can nearly cancel."""
        assert self.make().parameters[0].minimum == 0.0

    def test_all_coefficients_zero_give_the_base(self) -> None:
        problem = self.problem((1030, 3), torch.bfloat16)
        zeros = {**problem.values, "coefficient": torch.zeros(3, 2, dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, zeros))
        assert all(torch.equal(merged[name], tensor) for name, tensor in problem.base.items())


class TestTiesDisjointSum(TiesTwin):
    normalized = False

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Coefficients of both signs."""
        values = super().draw_values(num_experts, num_tensors, generator)
        signs = torch.rand((num_experts, num_tensors), generator=generator) < 0.3
        return {**values, "coefficient": torch.where(signs, -values["coefficient"], values["coefficient"])}

    def test_numbers_worked_out_by_hand(self) -> None:
        assert self.one([[0.3], [0.2], [-0.1]], [1.0, 0.5, 2.0]) == pytest.approx([0.4])

    def test_negative_coefficients_are_allowed(self) -> None:
        assert self.make().parameters[0].minimum == float("-inf")
        assert self.one([[0.3], [0.2]], [1.0, -2.0]) == pytest.approx([-0.4])


few_magnitudes = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=60)


def kept(magnitudes: Tensor, density: float) -> set[int]:
    threshold, last = keep_largest(magnitudes, density)
    return {i for i, x in enumerate(magnitudes.tolist()) if x > threshold or (x == threshold and i <= last)}


@given(few_magnitudes, st.floats(0, 1))
def test_keep_largest_keeps_exactly_the_asked_number_and_the_largest(numbers: list[float], density: float) -> None:
    chosen = kept(torch.tensor(numbers), density)
    assert len(chosen) == max(1, int(density * len(numbers)))
    dropped = [x for i, x in enumerate(numbers) if i not in chosen]
    assert not dropped or min(numbers[i] for i in chosen) >= max(dropped)


@given(few_magnitudes, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_density_keeps_what_a_smaller_one_kept(numbers: list[float], one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    assert kept(torch.tensor(numbers), smaller) <= kept(torch.tensor(numbers), larger)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**31))
def test_keep_largest_among_many_equal_magnitudes(size: int, density: float, seed: int) -> None:
    rounded = (0.01 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).bfloat16().float().abs()
    assert len(kept(rounded, density)) == max(1, int(density * size))
