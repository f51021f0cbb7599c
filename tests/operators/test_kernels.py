"""The kernels by themselves: padding, chunks and precision."""

import pytest
import torch

from evomerge.operators.kernels import BLOCK, CHUNK_BLOCKS, lincomb, task_vector_products


@pytest.mark.parametrize("num_blocks", [1, CHUNK_BLOCKS - 1, CHUNK_BLOCKS, CHUNK_BLOCKS + 1, 2 * CHUNK_BLOCKS + 3])
def test_every_block_is_written_with_its_own_weight(num_blocks: int) -> None:
    base_P = torch.ones(num_blocks * BLOCK)
    experts_KP = torch.full((1, num_blocks * BLOCK), 3.0)
    weights_KB = torch.stack([torch.ones(num_blocks), torch.arange(num_blocks) / 8]).double()
    out_P = torch.full_like(base_P, float("nan"))
    lincomb(out_P, base_P, experts_KP, weights_KB)
    expected = (1 + 2 * torch.arange(num_blocks) / 8)[:, None].expand(num_blocks, BLOCK)
    assert torch.equal(out_P.view(num_blocks, BLOCK), expected)


def test_bfloat16_sums_are_kept_in_float32() -> None:
    """256 experts that move a weight of 1 by 2^-9 each: a bfloat16 sum would stay at 1, since 1 + 2^-9 rounds to 1."""
    base_P = torch.ones(BLOCK, dtype=torch.bfloat16)
    experts_KP = torch.full((256, BLOCK), 1 + 2.0**-7, dtype=torch.bfloat16)
    weights_KB = torch.cat([torch.ones(1, 1), torch.full((256, 1), 0.25)]).double()
    out_P = torch.empty_like(base_P)
    lincomb(out_P, base_P, experts_KP, weights_KB)
    assert torch.equal(out_P, torch.full_like(base_P, 1.5))


def test_products_are_inner_products_with_base_and_task_vectors() -> None:
    gradient_E = torch.tensor([1.0, 2.0, -1.0])
    base_E = torch.tensor([3.0, 0.5, 2.0])
    experts_KE = torch.tensor([[4.0, 0.5, 2.0], [3.0, 1.0, 0.0]])
    products = task_vector_products(gradient_E, base_E, experts_KE)
    assert products.tolist() == [2.0, 1.0, 3.0]
    assert products.dtype == torch.float64


def test_products_of_half_precision_tensors_do_not_overflow() -> None:
    """10,000 terms of 100 * 100: a float16 sum would be infinite."""
    hundred_E = torch.full((10_000,), 100.0, dtype=torch.float16)
    products = task_vector_products(hundred_E, hundred_E, torch.stack([2 * hundred_E]))
    assert products.tolist() == [1e8, 1e8]
