"""Singular triplets that stand out of rounding, and polar factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_contract import slow_polar

from evomerge.operators.decompositions import polar, svd


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(0, 12), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_a_product_has_the_rank_of_its_factors(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    rank = min(left.shape[1], right.shape[1])
    matrix = (left[:, :rank] * torch.linspace(1, 0.01, rank)) @ right[:, :rank].T
    found = svd(matrix)
    assert len(found.s) == rank
    torch.testing.assert_close(found.u * found.s @ found.vh, matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.vh @ found.vh.T, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_the_rank_does_not_depend_on_the_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    assert len(svd(scale * matrix).s) == 3


def test_small_directions_that_are_real_are_kept() -> None:
    assert len(svd(torch.diag(torch.logspace(0, -5, 64))).s) == 64


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1)])
def test_a_polar_factor_is_the_nearest_orthonormal_matrix(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    found, few = polar(matrix), min(shape)
    gram = found.T @ found if shape[0] >= shape[1] else found @ found.T
    torch.testing.assert_close(gram, torch.eye(few, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, slow_polar(matrix), rtol=0, atol=1e-7)
    best = float(torch.linalg.matrix_norm(found - matrix))
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(max(shape), few, generator=generator, dtype=torch.float64)).Q
        assert best <= float(torch.linalg.matrix_norm((other if shape[0] >= shape[1] else other.T) - matrix))


def test_of_equal_columns_the_polar_factor_is_their_mean() -> None:
    """Two tasks that agree share their directions: each gets half of the square."""
    column = torch.tensor([[3.0], [4.0]]) / 5
    torch.testing.assert_close(polar(torch.cat([column, column], dim=1)), column.expand(2, 2) / 2**0.5)
