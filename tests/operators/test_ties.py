"""TIES in mergekit's convention and in the paper's."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from operator_contract import DifferentiableContract, Problem, lay_out, merge
from torch import Tensor
from trimmed_contract import (
    Place,
    SortedSumContract,
    TrimmedContract,
    assert_equals_mergekit,
    draws,
    golden_problem,
    largest,
    magnitude_gain,
)

from evomerge.operators.operator import Operator
from evomerge.operators.ties import Ties, TiesOptions, TiesPaper, TiesPaperOptions


class TiesContract(TrimmedContract):
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

    def test_another_density_reads_no_expert_again(self) -> None:
        problem = self.problem((900, 1030), torch.bfloat16, num_experts=2)
        sources, operator = lay_out(problem), self.make()
        first = operator.prepare(sources, problem.values, None)
        changed = {**problem.values, "density": problem.values["density"] * 0.5}
        again, fresh = operator.prepare(sources, changed, first), operator.prepare(sources, changed, None)
        assert again.cache is first.cache
        for name in ("gain_KS", "low_KS", "high_KS", "cut_KS"):
            assert torch.equal(getattr(again.trims, name), getattr(fresh.trims, name)), name
        assert not torch.equal(first.trims.low_KS, fresh.trims.low_KS)


class MergekitTwin(TiesContract):
    options: TiesOptions

    def make(self) -> Operator:
        return Ties(self.options)

    def trim(self, vector: Tensor, numbers: Mapping[str, float], place: Place) -> tuple[Tensor, Tensor]:
        num_kept = min(vector.numel(), max(1, int(numbers["density"] * vector.numel())))
        kept, undecided = largest(vector, num_kept, place)
        gain = 1.0
        if self.options.rescale:
            mass = vector.flatten().double().abs().sort(descending=True).values[:num_kept].sum()
            gain = magnitude_gain(vector, float(mass))
        return torch.where(kept, gain * vector.double(), 0.0), undecided

    def test_it_says_that_it_is_not_differentiable(self) -> None:
        assert not self.make().differentiable

    def test_a_tie_in_the_election_counts_as_positive(self) -> None:
        assert self.one([[0.5, -0.5], [-0.5, 0.5]], [1.0, 1.0]) == [0.5, 0.5]

    @pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
    def test_the_asked_share_of_a_rounded_task_vector_is_kept(self, density: float) -> None:
        """Where "at least the threshold" would keep a third for a fifth: bfloat16 weights moved by a hundredth."""
        if self.options.rescale:
            pytest.skip("the kept entries are not those of the expert")
        generator = torch.Generator().manual_seed(0)
        base = (0.02 * torch.randn(5000, generator=generator)).bfloat16()
        moved = (base + 2e-4 * torch.randn(5000, generator=generator)).bfloat16()
        values = {
            "coefficient": torch.ones(1, 1, dtype=torch.float64),
            "density": torch.full((1, 1), density, dtype=torch.float64),
            "scale": torch.ones(1, 1, dtype=torch.float64),
        }
        merged = merge(self.make(), Problem({"t": base}, [{"t": moved}], values))["t"]
        num_ties = 0.17 * 5000  # at the most; each is kept or not by a draw
        asked = min(int(density * 5000), int((moved != base).sum()))
        assert abs(int((merged != base).sum()) - asked) < 4 * (num_ties / 4) ** 0.5
        assert torch.equal(merged[merged != base], moved[merged != base])


class TestTies(MergekitTwin):
    options = TiesOptions()
    divide = "weights"

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

    def test_equals_mergekit(self) -> None:
        rows = {"coefficient": (0.5, 0.3, 0.2), "density": (0.5, 0.5, 0.5)}
        problem = golden_problem("ties_a", ("v1", "v2", "v3"), rows)
        assert_equals_mergekit("ties_a", problem, merge(self.make(), problem))


class TestTiesDisjointSum(MergekitTwin):
    options = TiesOptions(normalize=False)
    signed = True

    def test_numbers_worked_out_by_hand(self) -> None:
        assert self.one([[0.3], [0.2], [-0.1]], [1.0, 0.5, 2.0]) == pytest.approx([0.4])

    def test_negative_coefficients_are_allowed(self) -> None:
        assert self.make().parameters[0].minimum == float("-inf")
        assert self.one([[0.3], [0.2]], [1.0, -2.0]) == pytest.approx([-0.4])


class TestTiesRescaled(MergekitTwin):
    options = TiesOptions(rescale=True)
    divide = "weights"

    def test_numbers_worked_out_by_hand(self) -> None:
        """Of 4 + 1 + 1 half is kept, so 4 becomes 6."""
        assert self.one([[4.0, 1.0, -0.5, 0.5]], [1.0], density=0.25) == pytest.approx([6.0, 0.0, 0.0, 0.0])

    def test_equals_mergekit(self) -> None:
        """A density of 0.3 gives factors up to 2."""
        problem = golden_problem("ties_c_rescale", ("v1", "v2"), {"coefficient": (1.0, 1.0), "density": (0.3, 0.7)})
        assert_equals_mergekit("ties_c_rescale", problem, merge(self.make(), problem), gain=2.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_equals_the_twin_over_several_chunks(self, dtype: torch.dtype) -> None:
        pytest.skip("sums of large tensors are right to 2^-12, not to 2^-24: see test_masks.py")


class TestTiesByCount(MergekitTwin):
    options = TiesOptions(election="count")
    divide = "weights"
    elect = "count"

    def test_two_small_ones_outvote_a_large_one(self) -> None:
        assert self.one([[0.9], [-0.2], [-0.1]], [1.0, 0.5, 1.0]) == pytest.approx([-0.2 / 1.5])


class PaperTwin(TiesContract):
    options: TiesPaperOptions
    elect = "unweighted"
    none_at_zero = True
    signed = True

    def make(self) -> Operator:
        return TiesPaper(self.options)

    def trim_all(
        self, vectors: Mapping[str, Tensor], numbers: Mapping[str, Sequence[float]], expert: int, num_experts: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sort the whole model, once for every tensor, as each may have a density of its own."""
        whole = torch.cat([vector.flatten() for vector in vectors.values()])
        sizes, trimmed = [vector.numel() for vector in vectors.values()], {}
        for s, (name, vector) in enumerate(vectors.items()):
            place = Place(name, expert, num_experts)
            num_kept = min(len(whole), max(1, int(numbers["density"][s] * len(whole))))
            # Ties are drawn by the place within the tensor, so each tensor is trimmed with the others beside it.
            kept, undecided = largest_of_whole(whole, sum(sizes[:s]), vector, num_kept, place)
            trimmed[name] = torch.where(kept, vector.double(), 0.0), undecided
        return trimmed

    def test_tensors_that_moved_much_keep_more(self) -> None:
        problem = self.problem((1000, 1000), num_experts=1)
        for name, factor in (("t0", 10.0), ("t1", 1.0)):
            moved = problem.experts[0][name] - problem.base[name]
            problem.experts[0][name] = problem.base[name] + factor * moved
        values = {
            "coefficient": torch.ones(1, 2, dtype=torch.float64),
            "density": torch.full((1, 2), 0.5, dtype=torch.float64),
            "scale": torch.ones(1, 2, dtype=torch.float64),
        }
        merged = merge(self.make(), Problem(problem.base, problem.experts, values))
        kept = [int((merged[name] != problem.base[name]).sum()) for name in ("t0", "t1")]
        assert sum(kept) == 1000
        assert kept[0] > 800

    def test_nothing_is_merged_where_the_vote_is_zero(self) -> None:
        assert self.one([[0.5, -0.5, 0.5], [-0.5, 0.5, 0.0]], [1.0, 1.0]) == [0.0, 0.0, 0.5]

    def test_negating_the_task_vectors_negates_the_merge(self) -> None:
        vectors = [[0.3, -0.2, 0.1], [-0.3, 0.1, 0.4]]
        negated = [[-number for number in vector] for vector in vectors]
        assert self.one(negated, [1.0, 0.5]) == [-number for number in self.one(vectors, [1.0, 0.5])]

    def test_negative_coefficients_are_allowed(self) -> None:
        assert self.make().parameters[0].minimum == float("-inf")


def largest_of_whole(whole: Tensor, start: int, vector: Tensor, num_kept: int, place: Place) -> tuple[Tensor, Tensor]:
    """``largest`` of the whole model, of which ``vector`` begins at ``start``, ties drawn by the place in the tensor."""
    here = slice(start, start + vector.numel())
    kept, undecided = largest(whole, num_kept, place)
    last = whole.abs().sort(descending=True).values[num_kept - 1]
    ties = vector.flatten().abs() == last
    share = (num_kept - int((whole.abs() > last).sum())) / int((whole.abs() == last).sum())
    drawn = draws(place.name, place.num_experts, vector.numel(), 0, tie=True) < share
    kept_here = torch.where(ties, drawn, kept[here])
    return kept_here.view(vector.shape), undecided[here].view(vector.shape)


class TestTiesPaper(PaperTwin, SortedSumContract, DifferentiableContract):
    options = TiesPaperOptions()
    divide = "count"
    gradient_tolerance = 0.3  # directions in bfloat16: 262,144 terms of 0.1, each off by up to 2^-9 of itself

    def test_numbers_worked_out_by_hand(self) -> None:
        """tau = (.3, .2, -.1): .3 + .2 - .1 > 0, so (1 * .3 + .5 * .2) / 2 as peft has it, .25 with weights of 1."""
        assert self.one([[0.3], [0.2], [-0.1]], [1.0, 0.5, 2.0]) == pytest.approx([0.2])
        assert self.one([[0.3], [0.2], [-0.1]], [1.0, 1.0, 1.0]) == pytest.approx([0.25])


class TestTiesPaperSum(PaperTwin, SortedSumContract, DifferentiableContract):
    """What AdaMerging++ learns."""

    options = TiesPaperOptions(normalize=False)
    gradient_tolerance = 0.3

    def test_numbers_worked_out_by_hand(self) -> None:
        assert self.one([[0.3], [0.2], [-0.1]], [1.0, 1.0, 1.0]) == pytest.approx([0.5])
