"""OPCM against its official steps, with the singular vectors' whole square frames."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix_contract import SHAPES, MatrixContract, float32_task_vectors, result
from operator_contract import DifferentiableContract, Problem, TwinResult, inherited, lay_out, merge
from torch import Tensor

from evomerge.operators.opcm import Opcm, add_projected
from evomerge.operators.operator import Operator


def slow_projected(vector: Tensor, before: Tensor, alpha: float) -> tuple[Tensor, float]:
    """The task vector without what lies along ``before``, and the condition of the way to it.

    In the full frames u (M, M) and v (N, N) the diagonal ends where the numerical rank does.
    """
    u, s, vh = torch.linalg.svd(before, full_matrices=True)
    rank = int((s > 2 * 2**-23 * max(before.shape) ** 0.5 * s[:1]).sum())
    if not rank:
        return vector, 1.0
    shares = [float(s[: i + 1].sum() / s[:rank].sum()) for i in range(rank)]
    leading = next((i for i, share in enumerate(shares[:-1]) if share > alpha), rank if alpha >= 1 else rank - 1)
    framed = u.T @ vector @ vh.T
    for i in range(rank):
        framed[i, i] = 0.0
    framed[:leading, :leading] = 0.0
    gaps = torch.diff(s[:rank], append=torch.zeros(1, dtype=s.dtype)).abs()
    return u @ framed @ vh, float(s[0] / gaps.min())


def slow_sum(task_vectors: Sequence[Tensor], alpha: float) -> tuple[Tensor, float]:
    merged, condition = task_vectors[0], 1.0
    for vector in task_vectors[1:]:
        projected, one = slow_projected(vector, merged, alpha)
        merged, condition = merged + projected, condition + one
    return merged, condition


def norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(tensor**2).sum() for tensor in tensors]).sum().sqrt()


class TestOpcm(DifferentiableContract, MatrixContract):
    # The float32 SVD and the twin's may round an entry to different bfloat16 numbers; see TestTsvM.
    gradient_tolerance = 0.05

    def make(self) -> Operator:
        return Opcm()

    def shape(self, size: int) -> tuple[int, ...]:
        return super().shape(size) if size < 10_000 else (size,)  # the twin's square frames would take seconds

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        alpha, scale = torch.rand((2, 1, num_tensors), generator=generator, dtype=torch.float64)
        return {"alpha": alpha, "scale": scale + 0.2}

    def exact(self, problem: Problem) -> dict[str, TwinResult]:
        vectors = {
            name: float32_task_vectors(base, [expert[name] for expert in problem.experts])
            for name, base in problem.base.items()
        }
        merged: dict[str, tuple[Tensor, float]] = {}
        for s, (name, base) in enumerate(problem.base.items()):
            total, condition = torch.stack(vectors[name]).sum(0), 1.0
            if base.ndim == 2:
                total, condition = slow_sum(vectors[name], float(problem.values["alpha"][0, s].detach()))
            merged[name] = total.to(base.dtype).double(), condition  # as prepare keeps it
        norms = [norm([held[k] for held in vectors.values()]) for k in range(len(problem.experts))]
        together = norm([total for total, _ in merged.values()])
        rescale = torch.stack(norms).mean() / together if together else torch.ones((), dtype=torch.float64)
        results = {}
        for s, (name, base) in enumerate(problem.base.items()):
            scale, (total, condition) = problem.values["scale"][0, s] * rescale, merged[name]
            terms = torch.stack([vector.abs() for vector in vectors[name]]).sum(0)
            results[name] = result(base, scale * total, scale * (total.abs() + terms), condition)
        return results

    def test_each_tensor_takes_its_own_column(self) -> None:
        """Of the scale; alpha anywhere changes the norm of the whole, and so every tensor."""
        problem = self.problem((1025, 1025, 1025))
        merged = [
            merge(self.make(), Problem(problem.base, problem.experts, {**problem.values, name: changed}))
            for name in ("scale", "alpha")
            for changed in (problem.values[name], problem.values[name] + torch.tensor([[0.0, 0.3, 0.0]]).double() / 2)
        ]
        equal = [[torch.equal(merged[i][name], merged[i + 1][name]) for name in problem.base] for i in (0, 2)]
        assert equal == [[True, False, True], [False, False, False]]

    def test_the_order_of_experts_is_irrelevant(self) -> None:
        """It matters: the first expert is taken whole. Only the experts after it can be told from what it used."""
        problem = self.of_shapes(SHAPES, num_experts=2)
        one, other = merge(self.make(), problem), merge(self.make(), problem.reordered([1, 0]))
        assert not torch.equal(one["square"], other["square"])

    def test_the_merged_task_vector_has_the_mean_norm(self) -> None:
        problem = self.of_shapes(SHAPES)
        ones = {**problem.values, "scale": torch.ones(1, len(SHAPES), dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, ones))
        size, *norms = (
            float(norm([held[name].double() - base.double() for name, base in problem.base.items()]))
            for held in (merged, *problem.experts)
        )
        assert size == pytest.approx(sum(norms) / 3, rel=1e-6)

    def test_one_expert_is_that_expert(self) -> None:
        problem = self.of_shapes(SHAPES, num_experts=1)
        ones = {**problem.values, "scale": torch.ones(1, len(SHAPES), dtype=torch.float64)}
        merged = merge(self.make(), Problem(problem.base, problem.experts, ones))
        for name, expert in problem.experts[0].items():
            torch.testing.assert_close(merged[name], expert, rtol=0, atol=1e-6)

    def test_a_scale_that_changes_prepares_nothing(self) -> None:
        assert [spec.name for spec in self.make().parameters if spec.structural] == ["alpha"]
        problem = self.of_shapes(SHAPES)
        state = Opcm().prepare(lay_out(problem), problem.values, None)
        again = Opcm().prepare(lay_out(problem), {**problem.values, "scale": 2 * problem.values["scale"]}, state)
        assert again.directions is state.directions


def random_task_vectors(rows: int, columns: int, num_tasks: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(num_tasks)]


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    num_tasks=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**31),
)
@inherited
def test_the_thin_form_is_the_full_one(rows: int, columns: int, num_tasks: int, alpha: float, seed: int) -> None:
    vectors = random_task_vectors(rows, columns, num_tasks, seed)
    expected, condition = slow_sum(vectors, alpha)
    torch.testing.assert_close(add_projected(vectors, alpha), expected, rtol=0, atol=1e-12 * condition)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_is_added_is_orthogonal_to_what_was_there(alpha: float) -> None:
    """To each pair of singular vectors, so to the sum before it; and within the leading ones, to all combinations."""
    first, second = random_task_vectors(12, 16, num_tasks=2, seed=4)
    added = add_projected([first, second], alpha) - first
    u, s, vh = torch.linalg.svd(first, full_matrices=False)
    framed = u.T @ added @ vh.T
    assert float(framed.diagonal().abs().max()) < 1e-12
    assert float((added * first).sum().abs()) < 1e-10
    leading = int((s.cumsum(0) / s.sum() <= alpha + 1e-12).sum())
    assert leading == {0.0: 0, 0.5: 3, 1.0: 12}[alpha]
    assert not bool((framed[:leading, :leading].abs() > 1e-12).any())


def test_with_alpha_1_nothing_is_added_within_the_space_of_what_was_there() -> None:
    """The official code drops only the diagonal there: no cumulated share exceeds 1, and the search finds index 0."""
    first, second = random_task_vectors(9, 9, num_tasks=2, seed=5)
    torch.testing.assert_close(add_projected([first, second], 1.0), first, rtol=0, atol=1e-12)


def test_nothing_is_projected_out_of_the_first_after_zeros() -> None:
    [vector] = random_task_vectors(5, 8, num_tasks=1, seed=6)
    assert torch.equal(add_projected([torch.zeros_like(vector), vector], 0.5), vector)
