"""DARE against a twin with the same draws, and the statistics of its masks and of mergekit's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from golden import reference
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import SEVERAL_CHUNKS, DifferentiableContract, Problem, inherited, lay_out, merge
from torch import Tensor
from trimmed_contract import DrawnContract, Place, draws, flat_matrices, golden_problem, magnitude_gain

from evomerge.errors import CandidateError
from evomerge.operators.dare import DareLinear, DareOptions, DareTies
from evomerge.operators.operator import Operator

SIZE = 40_000


class DareTwin(DrawnContract):
    rescale: Literal["density", "l1", "none"] = "density"

    def trim(self, vector: Tensor, numbers: Mapping[str, float], place: Place) -> tuple[Tensor, Tensor]:
        density = numbers["density"]
        kept = (draws(place.name, place.expert, vector.numel(), self.seed) < density).view(vector.shape)
        gain = {
            "density": 1 / density,
            "none": 1.0,
            "l1": magnitude_gain(vector, float(vector[kept].double().abs().sum())),
        }[self.rescale]
        return torch.where(kept, gain * vector.double(), 0.0), torch.zeros_like(kept)

    def test_a_density_of_1_keeps_all(self) -> None:
        problem = self.problem((1030, 5))
        whole = replace(problem, values={**problem.values, "density": torch.ones(3, 2, dtype=torch.float64)})
        sources, operator = lay_out(whole), self.make()
        trims = operator.prepare(sources, whole.values, None).trims
        assert (trims.gain_KS - 1).abs().max() < 1e-12
        self.check(whole)

    def test_a_density_of_0_is_a_failed_candidate_only_where_it_divides(self) -> None:
        problem = self.problem((1030, 5))
        nothing = replace(problem, values={**problem.values, "density": torch.zeros(3, 2, dtype=torch.float64)})
        if self.rescale == "density":
            with pytest.raises(CandidateError, match="density of 0"):
                merge(self.make(), nothing)
        else:
            merged = merge(self.make(), nothing)
            assert all(torch.equal(merged[name], tensor) for name, tensor in problem.base.items())


class TestDareLinear(DareTwin, DifferentiableContract):
    elect = "no"
    signed = True
    gradient_tolerance = 0.3  # directions in bfloat16: 262,144 terms of 0.1 * gain, each off by up to 2^-9 of itself

    def make(self) -> Operator:
        return DareLinear()

    def test_the_gradient_needs_what_is_kept_and_no_more(self) -> None:
        problem = self.problem((1030, 5))
        sources, operator = lay_out(problem), DareLinear()
        state = operator.prepare(sources, problem.values, None)
        for k, expert in enumerate(operator.directions(sources, state).experts):
            for s, (name, segment) in enumerate(zip(problem.base, sources.layout.segments, strict=True)):
                vector = problem.experts[k][name] - problem.base[name]
                numbers = {"density": float(problem.values["density"][k, s])}
                kept, _ = self.trim(vector, numbers, Place(name, k, 3))
                torch.testing.assert_close(expert.buffer_P[segment].double(), kept, rtol=1e-6, atol=0)


class TestDareLinearWithoutFactor(DareTwin):
    elect = "no"
    rescale = "none"
    seed = 12345

    def make(self) -> Operator:
        return DareLinear(DareOptions(rescale="none", seed=self.seed))


class TestDareLinearByMagnitudes(DareTwin, DifferentiableContract):
    elect = "no"
    divide = "weights"
    rescale = "l1"
    gradient_tolerance = 0.3

    def make(self) -> Operator:
        return DareLinear(DareOptions(rescale="l1", normalize=True))

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        """Of a large tensor all is kept: its factors are interpolated otherwise; see ``test_masks.py``."""
        problem = super().problem(sizes, dtype, num_experts, seed)
        if tuple(sizes) != SEVERAL_CHUNKS:
            return problem
        return replace(problem, values={**problem.values, "density": torch.ones_like(problem.values["density"])})

    def test_coefficients_that_sum_to_zero_are_a_failed_candidate(self) -> None:
        problem = self.problem((1030, 5), num_experts=2)
        coefficients = torch.tensor([[0.5, 0.5], [0.5, -0.5]], dtype=torch.float64)
        with pytest.raises(CandidateError, match="dare_linear: the coefficients of a tensor sum to zero"):
            merge(self.make(), replace(problem, values={**problem.values, "coefficient": coefficients}))


class TestDareTies(DareTwin):
    signed = True

    def make(self) -> Operator:
        return DareTies()


class TestDareTiesNormalized(DareTwin):
    divide = "weights"

    def make(self) -> Operator:
        return DareTies(DareOptions(normalize=True))

    def test_negative_coefficients_are_out_of_range(self) -> None:
        assert self.make().parameters[0].minimum == 0.0


def masks(density: float, *, num_experts: int = 2, names: Sequence[str] = ("a", "b"), seed: int = 0) -> Tensor:
    """What is kept of task vectors of ones, (K, S, E)."""
    base = {name: torch.zeros(SIZE) for name in names}
    experts = [{name: torch.ones(SIZE) for name in names}] * num_experts
    values = {
        "density": torch.full((num_experts, len(names)), density, dtype=torch.float64),
        "scale": torch.ones(1, len(names), dtype=torch.float64),
    }
    rows = []
    for k in range(num_experts):
        one_hot = torch.zeros(num_experts, len(names), dtype=torch.float64)
        one_hot[k] = 1.0
        merged = merge(DareLinear(DareOptions(seed=seed)), Problem(base, experts, {**values, "coefficient": one_hot}))
        rows.append(torch.stack([merged[name] != 0 for name in names]))
    return torch.stack(rows)


def assert_independent(one: Tensor, other: Tensor, density: float) -> None:
    """Both are kept with probability density^2, within 5 standard deviations."""
    both = density**2
    assert abs(float((one & other).double().mean()) - both) < 5 * (both * (1 - both) / one.numel()) ** 0.5


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_masks_keep_the_asked_share_and_know_nothing_of_each_other(density: float) -> None:
    kept, other_seed = masks(density), masks(density, seed=1)
    deviation = (density * (1 - density) / SIZE) ** 0.5
    assert ((kept.double().mean(2) - density).abs() < 5 * deviation).all()
    assert_independent(kept[0], kept[1], density)  # of experts
    assert_independent(kept[:, 0], kept[:, 1], density)  # of tensors
    assert_independent(kept, other_seed, density)
    for lag in (1, 2, 32, 1024):  # of places
        assert_independent(kept[..., lag:], kept[..., :-lag], density)


def test_a_larger_density_keeps_what_a_smaller_one_kept() -> None:
    before = masks(0.1)
    for density in (0.11, 0.5, 0.9, 1.0):
        now = masks(density)
        assert not (before & ~now).any()
        before = now
    assert before.all()


def test_masks_depend_on_names_and_not_on_where_tensors_lie() -> None:
    assert torch.equal(masks(0.5, names=("a", "b")), masks(0.5, names=("b", "c", "a"))[:, [2, 0]])
    assert torch.equal(masks(0.5, num_experts=3)[:2], masks(0.5, num_experts=2))


@given(seed=st.integers(0, 2**31 - 1))
@inherited
def test_all_candidates_of_a_run_meet_the_same_masks(seed: int) -> None:
    """A state that was prepared for another candidate before gives the bits of a fresh one."""
    contract = TestDareLinearByMagnitudes()
    problem, before = contract.problem((700, 3), seed=seed), contract.problem((700, 3), seed=seed + 1)
    sources, operator = lay_out(problem), contract.make()
    fresh = operator.prepare(sources, problem.values, None)
    again = operator.prepare(sources, problem.values, operator.prepare(sources, before.values, None))
    merged = []
    for state in (fresh, again):
        merged.append(torch.empty_like(sources.base_P))
        operator.merge(merged[-1], sources, operator.weights(problem.values, state), state)
    assert torch.equal(*merged)


def test_statistics_are_those_of_mergekit() -> None:
    """Its draws are torch's and cannot be equal; what they make of the 14,336 entries of the matrices can.

    Where every expert moved (a third of the entries), all parts are dropped in an eighth of the cases, and the base's
    entry stays. All entries scatter around task arithmetic with a variance of w^2 tau^2 (1 - d) / d for each expert,
    and without bias: bounds of 5 standard deviations.
    """
    weights, density = (0.5, 0.3, 0.2), 0.5
    rows = {"coefficient": weights, "density": (density,) * 3}
    problem = golden_problem("zz_dare_linear_seed0", ("v1", "v2", "v3"), rows)
    base, vectors = flat_matrices(problem.base), torch.stack([flat_matrices(expert) for expert in problem.experts])
    vectors = vectors - base
    terms = torch.tensor(weights, dtype=torch.float64)[:, None] * vectors
    moved = (vectors.abs() > 1e-5).all(0)
    variance = float((terms**2).sum() * (1 - density) / density)
    ours = merge(DareLinear(DareOptions(rescale="l1")), problem)
    for merged in (ours, reference("zz_dare_linear_seed0")):
        delta = flat_matrices(merged) - base
        untouched = float((delta[moved].abs() < 1e-8).double().mean())
        assert abs(untouched - 0.125) < 5 * (0.125 * 0.875 / int(moved.sum())) ** 0.5
        off = delta - terms.sum(0)
        assert abs(float(off.sum())) < 5 * variance**0.5
        assert float((off**2).sum()) == pytest.approx(variance, rel=0.05)
        slopes = torch.linalg.lstsq(vectors.T, delta[:, None]).solution[:, 0]
        assert slopes.tolist() == pytest.approx(list(weights), abs=0.02)
