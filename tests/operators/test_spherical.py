"""The spherical family against its formulas, written out on whole vectors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import (
    DTYPES,
    DifferentiableContract,
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

from evomerge.errors import CampaignError, CandidateError
from evomerge.kernels.sources import LowRank
from evomerge.operators.operator import Operator
from evomerge.operators.spherical import (
    Karcher,
    KarcherOptions,
    MultiSlerp,
    MultiSlerpOptions,
    NuSlerp,
    NuSlerpOptions,
    Slerp,
    arc,
)
from evomerge.operators.vectors import Vectors


def vectors(base: Tensor, experts: Sequence[Tensor], relative: bool) -> list[Tensor]:
    """What is merged, in float64. Task vectors are rounded to float32, as they are everywhere: the weights of nearly
    opposite vectors magnify that rounding."""
    task_vectors = [(expert.float() - base.float()).double() for expert in experts]
    return task_vectors if relative else [base.double() + tau for tau in task_vectors]


def decided(merged: Tensor, magnitude: Tensor) -> TwinResult:
    return TwinResult(merged, magnitude.detach(), torch.zeros_like(merged, dtype=torch.bool))


def one_hot(problem: Problem, chosen: int) -> Problem:
    coefficients = torch.zeros_like(problem.values["coefficient"])
    coefficients[chosen] = 0.7
    return replace(problem, values={"coefficient": coefficients})


class ExactEnds(OperatorContract):
    """All the weight on one expert gives that expert."""

    @given(
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 10**6),
        num_experts=st.integers(1, 4),
        which=st.integers(0, 3),
    )
    @inherited
    def test_one_expert_alone_is_that_expert_exactly(
        self, dtype: torch.dtype, seed: int, num_experts: int, which: int
    ) -> None:
        problem = self.problem((1, 7, 1030), dtype, num_experts, seed)
        chosen = which % len(problem.experts)
        merged = merge(self.make(), one_hot(problem, chosen))
        assert all(torch.equal(merged[name], tensor) for name, tensor in problem.experts[chosen].items())

    def test_equal_experts_give_themselves(self) -> None:
        problem = self.problem((1, 7, 1030))
        same = replace(problem, experts=[problem.experts[0]] * len(problem.experts))
        merged = merge(self.make(), same)
        for name, tensor in problem.experts[0].items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)

    def test_coefficients_that_sum_to_zero_are_a_failed_candidate(self) -> None:
        problem = self.problem((7, 9))
        zeros = problem.values["coefficient"].clone()
        zeros[:, 1] = 0.0
        with pytest.raises(CandidateError, match="sum to zero"):
            merge(self.make(), replace(problem, values={"coefficient": zeros}))


class TestSlerp(DifferentiableContract):
    fewest = most = 1

    def make(self) -> Operator:
        return Slerp()

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        t, start, end = values["coefficient"][0], base.double(), experts[0].double()
        cosine = (start * end).sum() / (start.norm() * end.norm())
        if cosine.abs() > 0.9995:
            first, second = 1 - t, t
        else:
            angle = cosine.acos()
            first, second = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
        return decided(first * start + second * end, first.abs() * start.abs() + second.abs() * end.abs())

    @given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 1e-3]))
    @inherited
    def test_the_ends_are_base_and_expert_exactly(self, dtype: torch.dtype, seed: int, scale: float) -> None:
        """On an arc (t0, t1) and, with an expert that moved little, on the straight line."""
        problem = self.problem((1, 7, 1030), dtype, seed=seed)
        moved = {
            name: (tensor.double() + scale * (problem.experts[0][name].double() - tensor.double())).to(dtype)
            for name, tensor in problem.base.items()
        }
        for t, end in ((0.0, problem.base), (1.0, moved)):
            values = {"coefficient": torch.full((1, 3), t, dtype=torch.float64)}
            merged = merge(self.make(), Problem(problem.base, [moved], values))
            assert all(torch.equal(merged[name], tensor) for name, tensor in end.items())

    def test_half_way_round_a_quarter_circle(self) -> None:
        ends = {"t0": torch.tensor([1.0, 0.0])}, {"t0": torch.tensor([0.0, 1.0])}
        values = {"coefficient": torch.tensor([[0.5]], dtype=torch.float64)}
        merged = merge(Slerp(), Problem(ends[0], [ends[1]], values))["t0"]
        torch.testing.assert_close(merged, torch.full((2,), math.sqrt(0.5)))

    @pytest.mark.parametrize("num_experts", [0, 2])
    def test_it_wants_one_expert(self, num_experts: int) -> None:
        problem = self.problem((5,))
        with pytest.raises(CampaignError, match="expected one expert"):
            Slerp().prepare(lay_out(replace(problem, experts=list(problem.experts) * num_experts)), {}, None)


class NuSlerpTwin(ExactEnds):
    fewest = most = 2
    relative: bool
    vectors: Vectors = "tensor"

    def make(self) -> Operator:
        return NuSlerp(NuSlerpOptions(relative=self.relative, vectors=self.vectors))

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        t = values["coefficient"][1] / values["coefficient"].sum()
        parts = []
        for origin, *pair in zip(*(lines_of(tensor, self.vectors) for tensor in (base, *experts)), strict=True):
            one, other = vectors(origin, pair, self.relative)
            cosine = (one / one.norm() * (other / other.norm())).sum().clamp(-1, 1)
            angle = cosine.acos()
            if angle.sin() < 1e-6:
                first, second = 1 - t, t
            else:
                first, second = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
            merged = first * one + second * other + (origin.double() if self.relative else 0)
            sizes = [line.double().abs() + origin.double().abs() for line in pair]
            parts.append((merged, origin.double().abs() + first.abs() * sizes[0] + second.abs() * sizes[1]))
        merged, magnitude = (
            torch.stack(part, dim=1 if self.vectors == "columns" and base.ndim > 1 else 0).view(base.shape)
            for part in zip(*parts, strict=True)
        )
        return decided(merged, magnitude)

    @pytest.mark.parametrize("num_experts", [1, 3])
    def test_it_wants_two_experts(self, num_experts: int) -> None:
        problem = self.problem((5,))
        with pytest.raises(CampaignError, match="expected two experts"):
            self.make().prepare(lay_out(replace(problem, experts=[problem.base] * num_experts)), {}, None)


class TestNuSlerpOfTaskVectors(NuSlerpTwin, DifferentiableContract):
    relative = True

    def test_opposite_task_vectors_lie_on_a_line(self) -> None:
        base = {"t0": torch.tensor([1.0, 2.0])}
        experts = [{"t0": torch.tensor([1.5, 2.0])}, {"t0": torch.tensor([0.0, 2.0])}]
        values = {"coefficient": torch.tensor([[1.0], [1.0]], dtype=torch.float64)}
        assert merge(self.make(), Problem(base, experts, values))["t0"].tolist() == [0.75, 2.0]

    def test_an_expert_that_did_not_move_counts_as_perpendicular(self) -> None:
        base = {"t0": torch.tensor([1.0, 2.0])}
        values = {"coefficient": torch.tensor([[1.0], [1.0]], dtype=torch.float64)}
        merged = merge(self.make(), Problem(base, [base, {"t0": torch.tensor([1.0, 4.0])}], values))["t0"]
        torch.testing.assert_close(merged, torch.tensor([1.0, 2.0 + 2 * math.sqrt(0.5)]))


class TestNuSlerpOfExperts(NuSlerpTwin, DifferentiableContract):
    relative = False


class TestNuSlerpOfRows(NuSlerpTwin):
    relative = True
    vectors = "rows"
    shape = staticmethod(matrix_shape)


class TestNuSlerpOfColumns(NuSlerpTwin):
    relative = False
    vectors = "columns"
    shape = staticmethod(matrix_shape)


class MeanTwin(ExactEnds, DifferentiableContract):
    relative: bool

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        shares, origin = values["coefficient"] / values["coefficient"].sum(), base.double()
        held = vectors(base, experts, self.relative)
        lengths = torch.stack([vector.norm() for vector in held])
        units = [vector / length for vector, length in zip(held, lengths, strict=True)]
        start = sum((share * unit for share, unit in zip(shares, units, strict=True)), torch.zeros_like(origin))
        mean, sizes = self.mean(start / start.norm(), shares.detach() / start.detach().norm(), units, shares)
        length = (shares * lengths).sum()
        magnitude = origin.abs()
        for size, expert in zip(length * sizes / lengths, experts, strict=True):
            magnitude = magnitude + size * (expert.double().abs() + origin.abs())
        return decided(length * mean + (origin if self.relative else 0), magnitude)

    def mean(self, start: Tensor, sizes: Tensor, units: Sequence[Tensor], shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean direction, and of each unit vector the sum of the absolute terms that it enters with."""
        raise NotImplementedError


class MultiSlerpTwin(MeanTwin):
    def make(self) -> Operator:
        return MultiSlerp(MultiSlerpOptions(relative=self.relative))

    def mean(self, start: Tensor, sizes: Tensor, units: Sequence[Tensor], shares: Tensor) -> tuple[Tensor, Tensor]:
        """Project to the tangent space at the start, average, and go back along the sphere."""
        tangents = [unit - (unit * start).sum() * start for unit in units]
        step = sum((share * tangent for share, tangent in zip(shares, tangents, strict=True)), torch.zeros_like(start))
        if step.norm() < 1e-8:
            return start, sizes
        return step.norm().cos() * start + step.norm().sin() * step / step.norm(), sizes


class TestMultiSlerpOfTaskVectors(MultiSlerpTwin):
    relative = True

    @pytest.mark.parametrize("num_pairs", [1, 2])
    def test_directions_that_cancel_give_the_straight_mean(self, num_pairs: int) -> None:
        base = {"t0": torch.tensor([1.0, 2.0])}
        experts = [{"t0": torch.tensor([1.5, 2.0])}, {"t0": torch.tensor([0.0, 2.0])}] * num_pairs
        values = {"coefficient": torch.ones(2 * num_pairs, 1, dtype=torch.float64)}
        assert merge(self.make(), Problem(base, experts, values))["t0"].tolist() == [0.75, 2.0]

    def test_experts_that_did_not_move_leave_the_base_exactly(self) -> None:
        problem = self.problem((1030,), num_experts=3)
        merged = merge(self.make(), replace(problem, experts=[problem.base] * 3))
        assert torch.equal(merged["t0"], problem.base["t0"])


class TestMultiSlerpOfExperts(MultiSlerpTwin):
    relative = False


class KarcherTwin(MeanTwin):
    def make(self) -> Operator:
        return Karcher(KarcherOptions(relative=self.relative))

    def mean(self, start: Tensor, sizes: Tensor, units: Sequence[Tensor], shares: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(10):
            step, pulls, back = torch.zeros_like(start), torch.zeros_like(sizes), 0.0
            for k, (unit, share) in enumerate(zip(units, shares, strict=True)):
                cosine = (unit * start).sum().clamp(-1, 1)
                if 1 - cosine.abs() < 5e-11:
                    continue
                pull = share * cosine.acos() / cosine.acos().sin()
                step = step + pull * (unit - cosine * start)
                pulls[k] = pull.detach()
                back += float((pull * cosine.abs()).detach())
            if step.norm() < 1e-5:
                break
            along, across = step.norm().cos(), step.norm().sin() / step.norm()
            start = along * start + across * step
            sizes = along.detach().abs() * sizes + across.detach().abs() * (pulls + back * sizes)
        return start, sizes


class TestKarcherOfTaskVectors(KarcherTwin):
    relative = True

    def test_it_minimizes_the_squared_angles(self) -> None:
        """No small turn of the mean direction brings it nearer to the experts, on average."""
        problem = self.problem((40,), num_experts=3)
        base, units = problem.base["t0"].double(), vectors(problem.base["t0"], [e["t0"] for e in problem.experts], True)
        merged = merge(self.make(), problem)["t0"].double() - base
        shares = problem.values["coefficient"][:, 0] / problem.values["coefficient"].sum()

        def spread(direction: Tensor) -> float:
            cosines = torch.stack([(direction * unit).sum() / (direction.norm() * unit.norm()) for unit in units])
            return float((shares * cosines.acos() ** 2).sum())

        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            turn = torch.randn(40, generator=generator, dtype=torch.float64)
            assert spread(merged + 0.05 * merged.norm() * turn / turn.norm()) > spread(merged)


class TestKarcherOfExperts(KarcherTwin):
    relative = False

    def test_it_takes_the_experts_as_they_are_unless_told_otherwise(self) -> None:
        assert not KarcherOptions().relative
        assert Karcher().options == KarcherOptions()


@pytest.mark.parametrize("angle", [1e-7, 1e-5, 1e-3, 0.1, 1.5, 3.0])
def test_the_weights_are_good_to_all_digits_although_the_angle_is_not(angle: float) -> None:
    """acos of a cosine near 1 keeps half the digits: at an angle of 1e-7 none but the first."""
    t = torch.tensor([0.3], dtype=torch.float64)
    cosine = torch.tensor([math.cos(angle)], dtype=torch.float64)
    first, second = arc(t, cosine, straight=1 - 5e-13)
    assert float(first) == pytest.approx(math.sin(0.7 * angle) / math.sin(angle), rel=1e-12)
    assert float(second) == pytest.approx(math.sin(0.3 * angle) / math.sin(angle), rel=1e-12)


@pytest.mark.parametrize("operator", [NuSlerp(), MultiSlerp(), Karcher()])
def test_adapters_give_what_their_task_vectors_give(operator: Operator) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"t0": torch.randn(8, 6, generator=generator), "t1": torch.randn(5, generator=generator)}
    factors = [(torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator)) for _ in range(2)]
    experts = [{"t0": base["t0"] + b @ a, "t1": base["t1"]} for b, a in factors]
    values = {"coefficient": torch.tensor([[0.4, 0.4], [0.9, 0.9]], dtype=torch.float64)}
    dense = lay_out(Problem(base, experts, values))
    factored = replace(dense, experts=tuple(LowRank({0: pair}) for pair in factors))
    weights = [operator.weights(values, operator.prepare(sources, values, None)) for sources in (dense, factored)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)  # experts are rounded, adapters are not


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("operator_type", [NuSlerp, MultiSlerp, Karcher])
@pytest.mark.parametrize("moves", [(1.0, 1.0), (1.0, -1.0), (1.0, 0.0), (0.0, 0.0)])
def test_gradients_are_finite_where_an_angle_has_none(
    operator_type: type[NuSlerp | MultiSlerp], relative: bool, moves: tuple[float, float]
) -> None:
    """Equal, opposite and unmoved experts: acos, sqrt and divisions of a branch not taken must not leak a NaN."""
    operator = operator_type(operator_type.options_type(relative=relative))  # type: ignore[arg-type, call-arg]
    base = {"t0": torch.tensor([1.0, 2.0, 3.0])}
    tau = torch.tensor([0.5, -1.0, 0.25])
    coefficients = torch.tensor([[0.5], [0.5]], dtype=torch.float64, requires_grad=True)
    experts = [{"t0": base["t0"] + move * tau} for move in moves]
    values = {"coefficient": coefficients}
    weights = operator.weights(values, operator.prepare(lay_out(Problem(base, experts, values)), values, None))
    weights.sum().backward()
    assert weights.isfinite().all()
    assert coefficients.grad is not None
    assert coefficients.grad.isfinite().all()
