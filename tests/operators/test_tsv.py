"""TSV-Merge against its paper's steps."""

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
from operator_contract import DifferentiableContract, Problem, TwinResult, inherited, lay_out, merge
from torch import Tensor

from evomerge.kernels.sources import LowRank
from evomerge.operators.decompositions import Directions
from evomerge.operators.operator import Operator
from evomerge.operators.tsv import TsvM, whiten


def slow_terms(task_vectors: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Each task's term, and the condition of the way to it."""
    shape, num_tasks = task_vectors[0].shape, len(task_vectors)
    kept = min(shape) // num_tasks if len(shape) == 2 else 0
    if not kept:
        return [vector / num_tasks for vector in task_vectors], 1.0
    found = [cut_svd(vector) for vector in task_vectors]
    left = torch.cat([u[:, :kept] for u, _, _ in found], dim=1)
    right = torch.cat([vh[:kept] for _, _, vh in found]).T
    orthogonal_left, orthogonal_right = slow_polar(left), slow_polar(right)
    terms, start = [], 0
    for _, s, _ in found:
        here = slice(start, start + len(s[:kept]))
        terms.append(orthogonal_left[:, here] @ torch.diag(s[:kept]) @ orthogonal_right[:, here].T)
        start = here.stop
    gap = max(conditioning(s, kept) for _, s, _ in found)
    return terms, gap * (smallest(left) + smallest(right))


class TestTsvM(DifferentiableContract, MatrixContract):
    # The float32 SVD and the twin's may round a term's entry to different bfloat16 numbers, a step of 2^-8 apart: some
    # hundreds of 262,144 entries of 0.05, of a gradient's product of 30.
    gradient_tolerance = 0.05

    def make(self) -> Operator:
        return TsvM()

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        terms, condition = slow_terms(float32_task_vectors(base, experts))
        terms = [term.to(base.dtype).double() for term in terms]  # as prepare keeps them
        weighed = [c * term for c, term in zip(values["coefficient"], terms, strict=True)]
        update = torch.stack(weighed).sum(0)
        return result(base, update, torch.stack([term.abs() for term in weighed]).sum(0), condition)

    @pytest.mark.parametrize("coefficient", [1.0, -0.7])
    def test_one_expert_at_full_rank_is_its_task_vector(self, coefficient: float) -> None:
        problem = self.of_shapes(SHAPES, num_experts=1)
        values = {"coefficient": torch.full((1, len(SHAPES)), coefficient, dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, values))
        for name, base in problem.base.items():
            expected = base + coefficient * (problem.experts[0][name] - base)
            torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)

    def test_a_matrix_without_room_for_every_task_is_averaged(self) -> None:
        problem = self.of_shapes({"two": (2, 40)}, num_experts=3)
        ones = {"coefficient": torch.ones(3, 1, dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, ones))["two"]
        torch.testing.assert_close(merged, torch.stack([expert["two"] for expert in problem.experts]).mean(0))

    def test_preparing_again_keeps_the_terms(self) -> None:
        problem = self.of_shapes(SHAPES)
        sources, operator = lay_out(problem), TsvM()
        state = operator.prepare(sources, problem.values, None)
        assert operator.prepare(sources, problem.values, state) is state

    def test_terms_of_adapters_are_adapters_of_no_higher_rank(self) -> None:
        factored, _ = self.adapters(whole=False)
        held = TsvM().prepare(lay_out(factored), factored.values, None)
        assert isinstance(held, Directions)
        for k, term in enumerate(held.sources.experts):
            assert isinstance(term, LowRank)
            assert all(b.shape[1] == a.shape[0] <= 2 + k for b, a in term.factors.values())


@given(rows=st.integers(3, 12), columns=st.integers(3, 12), num_tasks=st.integers(1, 3), seed=st.integers(0, 2**31))
@inherited
def test_in_float64_the_terms_are_the_twins(rows: int, columns: int, num_tasks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(num_tasks)]
    expected, condition = slow_terms(vectors)
    for (left, right), term in zip(whiten(vectors, min(rows, columns) // num_tasks), expected, strict=True):
        assert right is not None
        # The twin's inverse root squares the condition.
        torch.testing.assert_close(left @ right, term, rtol=0, atol=1e-13 * condition**2)


@pytest.mark.parametrize("shape", [(12, 31), (31, 12), (16, 16)])
def test_directions_of_all_tasks_are_orthonormal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    terms = whiten([torch.randn(shape, generator=generator) for _ in range(3)], min(shape) // 3)
    right = torch.cat([vh for _, vh in terms if vh is not None])
    torch.testing.assert_close(right @ right.T, torch.eye(len(right)), rtol=0, atol=1e-5)
    left = torch.cat([left / torch.linalg.vector_norm(left, dim=0) for left, _ in terms], dim=1)
    torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1]), rtol=0, atol=1e-5)


@given(factor=st.floats(-3, 3).filter(lambda factor: abs(factor) > 1e-3), seed=st.integers(0, 2**31))
@inherited
def test_a_factor_on_a_task_vector_is_one_on_its_term_alone(factor: float, seed: int) -> None:
    """FusionBench scales task vectors before their SVD; a coefficient on the term does the same, negative ones too."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(9, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    plain, scaled = whiten(vectors, 2), whiten([vectors[0], factor * vectors[1], vectors[2]], 2)
    for k, ((left, right), (other_left, other_right)) in enumerate(zip(plain, scaled, strict=True)):
        assert right is not None
        assert other_right is not None
        term = left @ right * (factor if k == 1 else 1.0)
        torch.testing.assert_close(other_left @ other_right, term, rtol=0, atol=1e-9)


def test_equal_tasks_share_what_they_agree_on() -> None:
    """The sum of K equal task vectors' terms is that task vector, cut to rank min // K; nothing is counted twice."""
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(8, 10, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(vector, full_matrices=False)
    terms = whiten([vector, vector], 4)
    total = sum((left @ right for left, right in terms if right is not None), torch.zeros(8, 10, dtype=torch.float64))
    torch.testing.assert_close(total, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-9)
