"""DELLA against a twin with the same draws, and the statistics of its masks and of mergekit's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from golden import reference
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import SEVERAL_CHUNKS, DifferentiableContract, Problem, inherited, lay_out, matrix_shape, merge
from torch import Tensor
from trimmed_contract import DrawnContract, Place, draws, flat_matrices, golden_problem, magnitude_gain

from evomerge.operators.della import Della, DellaLinear, DellaLinearOptions, DellaOptions, magnitude_ranks
from evomerge.operators.operator import Operator


def ranks_by_counting(vector: Tensor) -> Tensor:
    """0 .. 1 within each row in steps of 1 / 32767, for equal magnitudes their mean; about 1/2 in a row of one entry."""
    rows = vector.abs().flatten(1) if vector.ndim > 1 else vector.abs()[None]
    ascending = rows.sort(dim=1).values
    if rows.shape[1] == 1:
        return torch.full(vector.shape, 16384 / 32767, dtype=torch.float64)
    # Entries that are smaller, and those that are no larger but for the entry itself: their mean is the mean rank.
    both = torch.searchsorted(ascending, rows) + torch.searchsorted(ascending, rows, right=True) - 1
    return ((both.double() * 32767 / (2 * (rows.shape[1] - 1))).round() / 32767).view(vector.shape)


class DellaTwin(DrawnContract):
    options: DellaLinearOptions

    def shape(self, size: int) -> tuple[int, ...]:
        return matrix_shape(size)

    def trim(self, vector: Tensor, numbers: Mapping[str, float], place: Place) -> tuple[Tensor, Tensor]:
        epsilon = self.options.epsilon
        probability = numbers["density"] - epsilon + 2 * epsilon * ranks_by_counting(vector)
        drawn = draws(place.name, place.expert, vector.numel(), self.options.seed).view(vector.shape)
        kept, undecided = drawn < probability, (drawn - probability).abs() < 2.0**-22  # float32 decides in the kernel
        gain = {
            "probability": lambda: 1 / probability,
            "none": lambda: torch.ones_like(probability),
            "l1": lambda: (
                magnitude_gain(vector, float(vector[kept].double().abs().sum())) * torch.ones_like(probability)
            ),
        }[self.options.rescale]()
        return torch.where(kept, gain * vector.double(), 0.0), undecided

    def test_rows_of_one_entry_are_kept_with_the_density(self) -> None:
        """mergekit's ranks are 0 / 0 there."""
        column = Problem({"t": torch.zeros(4000, 1)}, [{"t": torch.ones(4000, 1)}], {})
        values = {"coefficient": 1.0, "density": 0.6, "scale": 1.0}
        matrices = {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in values.items()}
        merged = merge(self.make(), replace(column, values=matrices))["t"]
        assert abs(float((merged != 0).double().mean()) - 0.6) < 5 * (0.24 / 4000) ** 0.5

    def test_densities_are_those_whose_probabilities_are_some(self) -> None:
        density = next(spec for spec in self.make().parameters if spec.name == "density")
        assert (density.minimum, density.maximum) == (self.options.epsilon, 1 - self.options.epsilon)

    def test_ranks_are_made_once(self) -> None:
        problem = self.problem((900, 1030), num_experts=2)
        sources, operator = lay_out(problem), self.make()
        first = operator.prepare(sources, problem.values, None)
        changed = {**problem.values, "density": problem.values["density"] * 0.9}
        assert operator.prepare(sources, changed, first).cache is first.cache


class TestDellaLinear(DellaTwin, DifferentiableContract):
    options = DellaLinearOptions()
    elect = "no"
    signed = True
    gradient_tolerance = 0.3  # directions in bfloat16: 262,144 terms of 0.1 / p, each off by up to 2^-9 of itself

    def make(self) -> Operator:
        return DellaLinear()


class TestDellaLinearByMagnitudes(DellaTwin):
    options = DellaLinearOptions(rescale="l1", epsilon=0.1, seed=3)
    elect = "no"

    def make(self) -> Operator:
        return DellaLinear(self.options)

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        """No large tensor: its factors are interpolated; see ``test_masks.py``."""
        return super().problem((3, 2000, 5) if tuple(sizes) == SEVERAL_CHUNKS else sizes, dtype, num_experts, seed)


class TestDella(DellaTwin):
    options = DellaOptions()
    divide = "weights"

    def make(self) -> Operator:
        return Della()

    def test_it_normalizes_unless_told_otherwise(self) -> None:
        assert self.make().parameters[0].minimum == 0.0
        assert Della(DellaOptions(normalize=False)).parameters[0].minimum == float("-inf")


class TestDellaWithoutFactor(DellaTwin):
    options = DellaOptions(rescale="none", normalize=False, epsilon=0.45)
    signed = True

    def make(self) -> Operator:
        return Della(self.options)


@given(rows=st.integers(1, 5), columns=st.integers(1, 60), seed=st.integers(0, 2**31))
@inherited
def test_ranks_are_the_share_of_smaller_magnitudes_in_the_row(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randint(-9, 10, (rows, columns), generator=generator).float()  # many are equal
    sources = lay_out(Problem({"t": torch.zeros_like(vector)}, [{"t": vector}], {}))
    ranks = magnitude_ranks(sources)[0, : vector.numel()].view(vector.shape)
    assert torch.equal(ranks.double() / 32767, ranks_by_counting(vector))


def test_a_convolution_is_ranked_filter_by_filter() -> None:
    vector = torch.arange(1.0, 25).view(2, 3, 2, 2)
    sources = lay_out(Problem({"t": torch.zeros_like(vector)}, [{"t": vector}], {}))
    ranks = magnitude_ranks(sources)[0, :24].view(2, 12)
    assert ranks[0].tolist() == ranks[1].tolist() == [round(32767 * i / 11) for i in range(12)]


def test_large_entries_are_kept_more_often_and_the_mean_is_right() -> None:
    rows, columns, density, epsilon = 200, 500, 0.5, 0.3
    vector = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    values = {"coefficient": 1.0, "density": density, "scale": 1.0}
    matrices = {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in values.items()}
    problem = Problem({"t": torch.zeros_like(vector)}, [{"t": vector}], matrices)
    merged = merge(DellaLinear(DellaLinearOptions(epsilon=epsilon)), problem)["t"]
    kept, ranks = (merged != 0).double(), ranks_by_counting(vector)
    deviation = (density * (1 - density) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - density) < 5 * deviation
    for part in range(5):
        here = (ranks * 5).long().clamp(max=4) == part
        middle = density - epsilon + 2 * epsilon * (part + 0.5) / 5
        assert abs(float(kept[here].mean()) - middle) < 5 * 5**0.5 * deviation
    probability = density - epsilon + 2 * epsilon * ranks
    variance = float((vector.double() ** 2 * (1 - probability) / probability).sum())
    assert abs(float((merged - vector).double().sum())) < 5 * variance**0.5
    assert float(((merged - vector).double() ** 2).sum()) == pytest.approx(variance, rel=0.05)


def test_statistics_are_those_of_mergekit() -> None:
    """Its draws are torch's and cannot be equal; what they make of the 14,336 entries of the matrices can.

    As for DARE, with a probability of its own for each entry; a factor a tensor gives the magnitudes their sum, so that
    an entry is p * gain of itself on average, and so are the slopes. Where two entries of a row are both 0, mergekit's
    order of them is arbitrary, which moves nothing. Bounds of 5 standard deviations.
    """
    weights, density, epsilon = (0.5, 0.3, 0.2), 0.5, 0.1
    rows = {"coefficient": weights, "density": (density,) * 3}
    problem = golden_problem("zz_della_linear_seed0", ("v1", "v2", "v3"), rows)
    base = flat_matrices(problem.base)
    vectors, terms, variance = [], torch.zeros_like(base), 0.0
    untouched_by = torch.ones_like(base)
    for weight, expert in zip(weights, problem.experts, strict=True):
        means = {}
        for name, tensor in problem.base.items():
            vector = (expert[name] - tensor).double()
            probability = density - epsilon + 2 * epsilon * ranks_by_counting(vector)
            gain = float(vector.abs().sum() / (probability * vector.abs()).sum())
            means[name] = gain * probability * vector
            if tensor.ndim == 2:
                variance += float((weight**2 * gain**2 * vector**2 * probability * (1 - probability)).sum())
        vectors.append(flat_matrices(means))
        terms += weight * vectors[-1]
        untouched_by *= 1 - flat_matrices(
            {
                name: density - epsilon + 2 * epsilon * ranks_by_counting(expert[name] - tensor)
                for name, tensor in problem.base.items()
            }
        )
    moved = (torch.stack(vectors).abs() > 1e-5).all(0)
    ours = merge(DellaLinear(DellaLinearOptions(rescale="l1", epsilon=epsilon)), problem)
    for merged in (ours, reference("zz_della_linear_seed0")):
        delta = flat_matrices(merged) - base
        untouched = float((delta[moved].abs() < 1e-8).double().mean())
        expected = float(untouched_by[moved].mean())
        assert abs(untouched - expected) < 5 * (expected * (1 - expected) / int(moved.sum())) ** 0.5
        off = delta - terms
        assert abs(float(off.sum())) < 5 * variance**0.5
        assert float((off**2).sum()) == pytest.approx(variance, rel=0.05)
        slopes = torch.linalg.lstsq(torch.stack(vectors).T, delta[:, None]).solution[:, 0]
        assert slopes.tolist() == pytest.approx(list(weights), abs=0.02)
