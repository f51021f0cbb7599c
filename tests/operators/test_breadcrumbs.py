"""Model Breadcrumbs against a twin that sorts, and against mergekit."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from golden import reference
from operator_contract import DifferentiableContract, Problem, merge
from torch import Tensor
from trimmed_contract import (
    Place,
    SortedSumContract,
    TrimmedContract,
    assert_equals_mergekit,
    golden_problem,
    largest,
    magnitude_gain,
)

from evomerge.operators.breadcrumbs import Breadcrumbs, BreadcrumbsOptions, BreadcrumbsTies
from evomerge.operators.operator import Operator


class BreadcrumbsTwin(TrimmedContract):
    options = BreadcrumbsOptions()

    def trim(self, vector: Tensor, numbers: Mapping[str, float], place: Place) -> tuple[Tensor, Tensor]:
        size = vector.numel()
        num_kept = min(size, max(1, int(numbers["density"] * size)))
        num_dropped = min(int(numbers["gamma"] * size), size - num_kept)
        reached, undecided = largest(vector, num_dropped + num_kept, place)
        outliers, undecided_above = largest(vector, num_dropped, place)
        gain = 1.0
        if self.options.rescale:
            descending = vector.flatten().double().abs().sort(descending=True).values
            gain = magnitude_gain(vector, float(descending[num_dropped : num_dropped + num_kept].sum()))
        return torch.where(reached & ~outliers, gain * vector.double(), 0.0), undecided | undecided_above

    def kept_of(self, size: int, density: float, gamma: float) -> list[float]:
        """What is merged of the task vector 1, 2, .. size."""
        values = {"coefficient": 1.0, "density": density, "gamma": gamma, "scale": 1.0}
        matrices = {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in values.items()}
        vector = {"t": torch.arange(1.0, size + 1)}
        merged = merge(self.make(), Problem({"t": torch.zeros(size)}, [vector], matrices))["t"]
        return [float(number) for number in merged if number != 0]

    def test_the_largest_and_the_smallest_are_dropped(self) -> None:
        if self.options.rescale:
            pytest.skip("the kept entries are not those of the expert")
        assert self.kept_of(10, density=0.3, gamma=0.2) == [6, 7, 8]

    def test_gamma_gives_way_to_density(self) -> None:
        if self.options.rescale:
            pytest.skip("the kept entries are not those of the expert")
        assert self.kept_of(10, density=0.9, gamma=0.5) == list(range(1, 10))
        assert self.kept_of(10, density=1.0, gamma=0.1) == list(range(1, 11)), "a density of 1 drops no outliers"

    @pytest.mark.parametrize("gamma", [0.0, 0.09])
    def test_no_outliers_leave_the_largest(self, gamma: float) -> None:
        """Where mergekit's slice is empty, and the whole task vector is lost."""
        if self.options.rescale:
            pytest.skip("the kept entries are not those of the expert")
        assert self.kept_of(10, density=0.3, gamma=gamma) == [8, 9, 10]


class TestBreadcrumbs(BreadcrumbsTwin, SortedSumContract, DifferentiableContract):
    elect = "no"
    signed = True
    gradient_tolerance = 0.3  # directions in bfloat16: 262,144 terms of 0.1, each off by up to 2^-9 of itself

    def make(self) -> Operator:
        return Breadcrumbs()

    def test_equals_mergekit(self) -> None:
        rows = {"coefficient": (0.5, 0.3, 0.2), "density": (0.9, 0.9, 0.9), "gamma": (0.02, 0.02, 0.02)}
        problem = golden_problem("breadcrumbs_a", ("v1", "v2", "v3"), rows)
        assert_equals_mergekit("breadcrumbs_a", problem, merge(self.make(), problem))


class TestBreadcrumbsNormalized(BreadcrumbsTwin):
    elect = "no"
    divide = "weights"

    def make(self) -> Operator:
        return Breadcrumbs(BreadcrumbsOptions(normalize=True))


class TestBreadcrumbsTies(BreadcrumbsTwin):
    signed = True

    def make(self) -> Operator:
        return BreadcrumbsTies()


class TestBreadcrumbsTiesRescaled(BreadcrumbsTwin, SortedSumContract):
    options = BreadcrumbsOptions(normalize=True, rescale=True)
    divide = "weights"

    def make(self) -> Operator:
        return BreadcrumbsTies(self.options)

    def test_equals_mergekit(self) -> None:
        """Numbers by depth and by name: lists are read at layer / 3, filters by the first match, as mergekit does.

        Densities of 0.4 give factors up to 2.
        """
        names = list(reference("breadcrumbs_ties_b_grad"))
        depths = [int(name.split(".")[2]) / 3 if "layers" in name else 0.0 for name in names]

        def list_at(numbers: list[float], depth: float) -> float:
            place = depth * (len(numbers) - 1)
            first = min(int(place), len(numbers) - 2)
            return numbers[first] + (place - first) * (numbers[first + 1] - numbers[first])

        by_name = [0.4 if "self_attn" in name else 0.6 if "mlp" in name else 0.8 for name in names]
        by_depth = [list_at([0.0, 0.25, 0.75, 1.0], depth) for depth in depths]
        densities = [list_at([0.4, 0.8], depth) for depth in depths]
        same = torch.ones(len(names), dtype=torch.float64)
        rows = {
            "coefficient": torch.tensor([by_depth, by_name], dtype=torch.float64),
            "density": torch.stack([0.5 * same, torch.tensor(densities, dtype=torch.float64)]),
            "gamma": torch.stack([0.05 * same, 0.03 * same]),
        }
        problem = golden_problem("breadcrumbs_ties_b_grad", ("v1", "v2"), rows)
        assert_equals_mergekit("breadcrumbs_ties_b_grad", problem, merge(self.make(), problem), gain=2.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nearly_nothing_left_is_left_as_it_is(self, dtype: torch.dtype) -> None:
        problem = self.problem((50,), dtype, num_experts=1)
        still = replace(problem, experts=[problem.base])
        merged = merge(self.make(), still)
        assert torch.equal(merged["t0"], problem.base["t0"])
