"""Iso-C and Iso-CTS against their paper's steps."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix_contract import (
    SHAPES,
    MatrixContract,
    conditioning,
    cut_svd,
    float32_task_vectors,
    result,
    slow_polar,
    smallest,
)
from operator_contract import DifferentiableContract, TwinResult, inherited, lay_out
from torch import Tensor

from evomerge.operators.iso import IsoC, IsoCts, common_and_task_spaces, flatten_spectrum
from evomerge.operators.operator import Operator

Merged = tuple[Tensor, float]
"""A merged matrix, and the condition of the way to it."""


def slow_iso_c(task_vectors: Sequence[Tensor]) -> Merged:
    total = torch.stack(list(task_vectors)).sum(0)
    u, s, vh = cut_svd(total)
    if not len(s):
        return torch.zeros_like(total), 1.0
    return s.mean() * u @ vh, float(s[0] / s[-1])


def slow_iso_cts(task_vectors: Sequence[Tensor], fraction: float) -> Merged:
    """In the order of the official code: the tasks' directions first, the common ones behind them."""
    num_tasks, total = len(task_vectors), torch.stack(list(task_vectors)).sum(0)
    u, s, vh = cut_svd(total)
    if not len(s):
        return torch.zeros_like(total), 1.0
    num_own = round((len(s) - int(len(s) * fraction)) / num_tasks)
    while num_own * num_tasks > len(s):
        num_own -= 1
    num_common = len(s) - num_own * num_tasks
    lefts, singular, rights, condition = [], [], [], conditioning(s, num_common)
    for vector in task_vectors:
        own_u, own_s, own_vh = cut_svd(vector - u[:, :num_common] @ u[:, :num_common].T @ vector)
        keep = own_s > 2 * 2**-23 * max(vector.shape) ** 0.5 * torch.linalg.matrix_norm(vector)
        own_u, own_s, own_vh = own_u[:, keep], own_s[keep], own_vh[keep]
        lefts.append(own_u[:, :num_own])
        singular.append(own_s[:num_own])
        rights.append(own_vh[:num_own])
        if num_own and len(own_s):
            largest = torch.linalg.matrix_norm(vector)
            condition += conditioning(own_s, num_own) * float(largest / own_s[0])
    left = torch.cat([*lefts, u[:, :num_common]], dim=1)
    right = torch.cat([*rights, vh[:num_common]])
    mean = torch.cat([*singular, s[:num_common]]).mean()
    merged = slow_polar(left) @ torch.diag(mean.expand(left.shape[1])) @ slow_polar(right.T).T
    return merged, condition * (smallest(left) + smallest(right))


class IsoTwin(DifferentiableContract, MatrixContract):
    # The float32 SVD and the twin's may round an entry to different bfloat16 numbers; see TestTsvM.
    gradient_tolerance = 0.05

    def merge_matrices(self, task_vectors: Sequence[Tensor], values: Mapping[str, Tensor]) -> Merged:
        raise NotImplementedError

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        values = super().draw_values(num_experts, num_tensors, generator)
        values["scale"] = torch.rand((1, num_tensors), generator=generator, dtype=torch.float64) + 0.2
        return values

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        pairs = zip(values["coefficient"].detach(), float32_task_vectors(base, experts), strict=True)
        weighed = [c * vector for c, vector in pairs]
        terms = torch.stack([vector.abs() for vector in weighed]).sum(0)
        merged, condition = torch.stack(weighed).mean(0), 1.0
        if base.ndim == 2:
            merged, condition = self.merge_matrices(weighed, values)
        merged = merged.to(base.dtype).double()  # as prepare keeps it
        return result(base, values["scale"][0] * merged, values["scale"][0] * (merged.abs() + terms), condition)

    def test_a_coefficient_that_changes_makes_its_tensors_anew_and_no_others(self) -> None:
        operator, problem = self.make(), self.of_shapes(SHAPES)
        sources, made = lay_out(problem), []
        fuse = operator.fuse  # type: ignore[attr-defined]

        def counted(task_vectors: Sequence[Tensor], *rest: object) -> object:
            made.append(tuple(task_vectors[0].shape))
            return fuse(task_vectors, *rest)

        operator.fuse = counted  # type: ignore[attr-defined]
        state = operator.prepare(sources, problem.values, None)
        assert made == list(SHAPES.values())
        other = {name: matrix.clone() for name, matrix in problem.values.items()}
        other["coefficient"][1, [2, 4]] += 0.1
        other["scale"] += 1
        operator.prepare(sources, other, state)
        assert made[len(SHAPES) :] == [SHAPES["square"], SHAPES["column"]]


class TestIsoC(IsoTwin):
    def make(self) -> Operator:
        return IsoC()

    def merge_matrices(self, task_vectors: Sequence[Tensor], values: Mapping[str, Tensor]) -> Merged:
        return slow_iso_c(task_vectors)


class TestIsoCts(IsoTwin):
    def make(self) -> Operator:
        return IsoCts()

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        values = super().draw_values(num_experts, num_tensors, generator)
        values["common_fraction"] = torch.rand((1, num_tensors), generator=generator, dtype=torch.float64)
        return values

    def merge_matrices(self, task_vectors: Sequence[Tensor], values: Mapping[str, Tensor]) -> Merged:
        return slow_iso_cts(task_vectors, float(values["common_fraction"].detach()))


def random_task_vectors(rows: int, columns: int, num_tasks: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(num_tasks)]


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    num_tasks=st.integers(1, 4),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 2**31),
)
@inherited
def test_in_float64_both_are_their_twins(rows: int, columns: int, num_tasks: int, fraction: float, seed: int) -> None:
    vectors = random_task_vectors(rows, columns, num_tasks, seed)
    left, right = flatten_spectrum(vectors)
    assert right is not None
    expected, condition = slow_iso_c(vectors)
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-13 * condition)
    left, right = common_and_task_spaces(vectors, fraction)
    assert right is not None
    expected, condition = slow_iso_cts(vectors, fraction)
    # The twin's inverse root squares the condition.
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-12 * condition**2)


@pytest.mark.parametrize("shape", [(12, 31), (31, 12), (16, 16), (1, 9)])
def test_all_singular_values_are_equal_and_their_mean_is_kept(shape: tuple[int, int]) -> None:
    vectors = random_task_vectors(*shape, num_tasks=3, seed=0)
    left, right = flatten_spectrum(vectors)
    assert right is not None
    before, after = (torch.linalg.svdvals(matrix) for matrix in (torch.stack(vectors).sum(0), left @ right))
    torch.testing.assert_close(after, before.mean().expand(min(shape)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_the_spaces_together_are_isotropic_too(fraction: float) -> None:
    left, right = common_and_task_spaces(random_task_vectors(12, 31, num_tasks=3, seed=1), fraction)
    assert right is not None
    after = torch.linalg.svdvals(left @ right)
    torch.testing.assert_close(after, after.mean().expand(12), rtol=1e-10, atol=0)


def test_with_everything_common_both_are_the_same() -> None:
    vectors = random_task_vectors(9, 7, num_tasks=3, seed=2)
    (one_left, one_right), (other_left, other_right) = flatten_spectrum(vectors), common_and_task_spaces(vectors, 1.0)
    assert one_right is not None
    assert other_right is not None
    torch.testing.assert_close(one_left @ one_right, other_left @ other_right, rtol=0, atol=1e-12)


def test_of_low_rank_only_what_there_is_is_lifted() -> None:
    """Two directions of 3 and 1 become two of 2; the ten arbitrary ones beyond stay at zero."""
    vectors = random_task_vectors(12, 20, num_tasks=1, seed=3)
    u, _, vh = torch.linalg.svd(vectors[0], full_matrices=False)
    for merged in (
        flatten_spectrum([3 * u[:, :1] @ vh[:1], u[:, 1:2] @ vh[1:2]]),
        common_and_task_spaces([3 * u[:, :1] @ vh[:1], u[:, 1:2] @ vh[1:2]], 0.0),
    ):
        assert merged[1] is not None
        after = torch.linalg.svdvals(merged[0] @ merged[1])
        torch.testing.assert_close(after[:2], torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-9, atol=0)
        assert float(after[2:].max()) < 1e-9
