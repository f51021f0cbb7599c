"""What every operator promises that decomposes matrices, beyond ``OperatorContract``.

Twins are literal: whole float64 matrices, in the steps of the papers. They start from the float32 task vectors, as the
operators do, and cut at the same numerical rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from operator_contract import Factors, OperatorContract, Problem, TwinResult, lay_out, merge
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
SHAPES = {"wide": (12, 31), "tall": (31, 12), "square": (16, 16), "row": (1, 20), "column": (9, 1), "one": (1, 1)}
OTHERS = {"vector": (17,), "kernel": (4, 3, 2, 2), "scalar": ()}


def float32_task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    return [(expert.float() - base.float()).double() for expert in experts]


def cut_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 2 * EPS * max(matrix.shape) ** 0.5 * s[:1]).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def slow_polar(matrix: Tensor) -> Tensor:
    """X (X^T X)^(-1/2), the definition; of dependent columns with the pseudo-inverse root."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    roots = torch.where(values > 1e-10 * values[-1:], values, torch.inf).rsqrt()
    return matrix @ (vectors * roots) @ vectors.T


def conditioning(s: Tensor, place: int) -> float:
    """Largest singular value over the gap at a place: by how much an SVD magnifies its own rounding."""
    place = min(place, len(s))
    return float(s[0] / (s[place - 1] - s[place : place + 1].sum())) if place else 1.0


def smallest(matrix: Tensor) -> float:
    """The inverse of the smallest nonzero singular value: by how much a polar factor magnifies."""
    _, s, _ = cut_svd(matrix)
    return float(1 / s[-1]) if len(s) else 1.0


def result(base: Tensor, update: Tensor, held: Tensor, condition: float) -> TwinResult:
    """base + update; held: the sum of the absolute terms of what ``prepare`` keeps.

    What rounding errors scale with: for a decomposition, the entries of what it makes, times its condition.
    """
    merged = base.double() + update
    size = held.detach().abs().max() * condition
    magnitude = base.double().abs() + held.detach().abs() + size
    return TwinResult(merged, magnitude, torch.zeros_like(merged, dtype=torch.bool), held.detach().abs())


class MatrixContract(OperatorContract):
    """Tensors are matrices, wide, tall and square; those of 11 n elements are vectors."""

    def shape(self, size: int) -> tuple[int, ...]:
        if size % 11 == 0:
            return (size,)
        rows = next(rows for rows in range(int(size**0.5), 0, -1) if size % rows == 0)
        return (rows, size // rows) if size % 2 else (size // rows, rows)

    def of_shapes(self, shapes: Mapping[str, tuple[int, ...]], num_experts: int = 3, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        experts = [
            {name: held + 0.1 * torch.randn(held.shape, generator=generator) for name, held in base.items()}
            for _ in range(num_experts)
        ]
        return Problem(base, experts, self.draw_values(num_experts, len(base), generator))

    def adapters(self, whole: bool, num_experts: int = 3) -> tuple[Problem, Problem]:
        """Adapters, and checkpoints with the same task vectors. The first expert adapts no ``wide``, none ``square``.

        whole: adapters also hold whole task vectors, of a vector and of a matrix.
        """
        generator = torch.Generator().manual_seed(7)
        shapes = {**SHAPES, **(OTHERS if whole else {})}
        base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        factored: list[dict[str, Any]] = []
        for k in range(num_experts):
            held: dict[str, Any] = {}
            for name, shape in shapes.items():
                rank, size = 2 + k, base[name].numel()
                if name == "square" or (name == "wide" and k == 0):
                    continue
                if len(shape) != 2 or (whole and name == "tall" and k == 1):
                    held[name] = Factors(torch.randn(size, 1, generator=generator), torch.ones(1, 1), 0.1)
                else:
                    b, a = (torch.randn(one, generator=generator) for one in ((shape[0], rank), (rank, shape[1])))
                    held[name] = Factors(b, a, 0.1)
            factored.append(held)
        values = self.draw_values(num_experts, len(base), generator)
        # On a base of zero nothing is lost when the task vector is added and subtracted.
        base = {name: torch.zeros_like(held) for name, held in base.items()}
        dense = [
            {
                name: (part.scaling * part.b @ part.a).view(zero.shape) if (part := held.get(name)) else zero
                for name, zero in base.items()
            }
            for held in factored
        ]
        return Problem(base, factored, values), Problem(base, dense, values)

    @pytest.mark.parametrize("num_experts", [1, 2, 3])
    def test_equals_the_twin_for_every_shape(self, num_experts: int) -> None:
        self.check(self.of_shapes({**SHAPES, **OTHERS}, num_experts))

    def test_float32_is_usually_much_closer_to_the_twin(self) -> None:
        """The twin's bounds allow for the worst that a condition can do, 100 times what is found here."""
        problem = self.of_shapes(SHAPES)
        merged, exact = merge(self.make(), problem), self.exact(problem)
        for name, base in problem.base.items():
            size = torch.linalg.vector_norm(exact[name].merged - base.double())
            assert torch.linalg.vector_norm(merged[name].double() - exact[name].merged) < 1e-5 * size

    def test_equals_the_twin_for_task_vectors_of_low_rank(self) -> None:
        self.check(self.adapters(whole=True)[1])

    @pytest.mark.parametrize("whole", [False, True])
    def test_adapters_give_what_their_checkpoints_give(self, whole: bool) -> None:
        factored, dense = self.adapters(whole)
        one, other = merge(self.make(), factored), merge(self.make(), dense)
        for name, exact in self.exact(dense).items():
            apart = (one[name].double() - other[name].double()).abs() > 40 * 2.0**-24 * exact.magnitude
            assert not (apart & ~exact.undecided).any()
        assert torch.equal(one["square"], factored.base["square"])

    @pytest.mark.parametrize("form", ["checkpoints", "adapters"])
    def test_zero_task_vectors_give_the_base(self, form: str) -> None:
        problem = self.of_shapes({**SHAPES, **OTHERS})
        zero = Factors(torch.zeros(12, 2), torch.zeros(2, 31), 1.0)
        experts: list[dict[str, Any]] = [{"wide": zero}] * 3 if form == "adapters" else [dict(problem.base)] * 3
        merged = merge(self.make(), replace(problem, experts=experts))
        assert all(torch.equal(merged[name], tensor) for name, tensor in problem.base.items())

    def test_one_zero_task_vector_among_others(self) -> None:
        problem = self.of_shapes(SHAPES)
        self.check(replace(problem, experts=[problem.experts[0], dict(problem.base), problem.experts[2]]))

    def test_an_earlier_preparation_of_other_numbers_makes_no_difference(self) -> None:
        """What prepare takes over from the last state is what it would have made."""
        operator, problem = self.make(), self.of_shapes({**SHAPES, **OTHERS})
        structural = [spec.name for spec in operator.parameters if spec.structural]
        sources = lay_out(problem)
        other = {name: matrix.clone() for name, matrix in problem.values.items()}
        for name in structural:
            other[name][:, [0, 3, 6]] *= 0.8
        state = operator.prepare(sources, other, operator.prepare(sources, problem.values, None))
        out_P = torch.empty_like(sources.base_P)
        operator.merge(out_P, sources, operator.weights(other, state), state)
        expected = merge(operator, replace(problem, values=other))
        for name, segment in zip(problem.base, sources.layout.segments, strict=True):
            assert torch.equal(out_P[segment].view(expected[name].shape), expected[name])
