"""The kernels: whole-model merges over flat buffers, in place, with float32 accumulation and a single rounding.

A checkpoint is one flat buffer in which every tensor starts on a block of 1,024 elements; coefficients come as one
number a block. The expressions are walked in chunks that stay in the processor's cache: fresh temporaries of a whole
model would cost ten times the merge itself in page faults.

Shape letters: K experts, P padded elements of a checkpoint, B blocks (P = 1024 B), E elements of one tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1024
CHUNK_BLOCKS = 256  # 1 MiB in float32: a few such buffers fit the L2 cache


def _chunks(num_blocks: int) -> Iterator[tuple[slice, slice]]:
    """Yield (slice of blocks, slice of elements)."""
    for first in range(0, num_blocks, CHUNK_BLOCKS):
        last = min(first + CHUNK_BLOCKS, num_blocks)
        yield slice(first, last), slice(first * BLOCK, last * BLOCK)


def lincomb(out_P: Tensor, base_P: Tensor, experts_KP: Tensor, weights_KB: Tensor) -> None:
    """Write ``w[0] * base + sum_k w[k] * (expert_k - base)`` to ``out_P``.

    Shapes: weights_KB (K+1, B), float64: row 0 scales the base, the others the task vectors. The task vectors are
    never formed: base is read once with the coefficient ``w[0] - sum_k w[k]``, so that all-zero weights give the base
    and one expert at 1 gives that expert, bit for bit (but for the sign of a zero).
    """
    base_weight_B1 = (weights_KB[0] - weights_KB[1:].sum(0)).float()[:, None]
    expert_weights_KB1 = weights_KB[1:].float()[:, :, None]
    accumulator = torch.empty(CHUNK_BLOCKS, BLOCK, device=out_P.device)
    widened = torch.empty_like(accumulator)
    for blocks, elements in _chunks(weights_KB.shape[1]):
        total, addend = (buffer[: blocks.stop - blocks.start] for buffer in (accumulator, widened))
        total.copy_(base_P[elements].view(-1, BLOCK)).mul_(base_weight_B1[blocks])
        for expert_P, weight_B1 in zip(experts_KP, expert_weights_KB1, strict=True):
            total.addcmul_(addend.copy_(expert_P[elements].view(-1, BLOCK)), weight_B1[blocks])
        out_P[elements].view(-1, BLOCK).copy_(total)


def masked_consensus(
    out_P: Tensor, base_P: Tensor, experts_KP: Tensor, weights_KB: Tensor, trims: tuple[Tensor, Tensor], normalize: bool
) -> None:
    """Write base plus, per element, the combination of the trimmed task vectors that agree with the elected sign.

    Shapes: weights_KB (K+1, B), float64: row 0 scales the consensus, the others weigh the task vectors.
    trims = (thresholds_KB float32, cutoffs_KB int64): an entry is kept if its magnitude is above the threshold, or
    equal to it and its position in the buffer is at most the cutoff (so that exactly the asked share is kept).
    The sign is elected after weighting, a zero sum counts as positive; the sum of agreeing entries is divided by the
    sum of their weights if ``normalize`` (an empty sum by 1). This is mergekit's convention; see ``ties.py``.
    """
    thresholds_KB, cutoffs_KB = trims
    scale_B1, expert_weights_KB1 = weights_KB[0].float()[:, None], weights_KB[1:].float()[:, :, None]
    position = torch.arange(CHUNK_BLOCKS * BLOCK, device=out_P.device).view(CHUNK_BLOCKS, BLOCK)
    for blocks, elements in _chunks(weights_KB.shape[1]):
        base = base_P[elements].view(-1, BLOCK).float()
        here = position[: len(base)] + elements.start
        vectors = experts_KP[:, elements].view(len(experts_KP), -1, BLOCK).float() - base
        magnitude, threshold = vectors.abs(), thresholds_KB[:, blocks, None]
        kept = (magnitude > threshold) | ((magnitude == threshold) & (here <= cutoffs_KB[:, blocks, None]))
        weight = expert_weights_KB1[:, blocks]
        weighted = torch.where(kept, vectors * weight, 0.0)
        elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agrees = weighted.sign() == elected
        consensus = torch.where(agrees, weighted, 0.0).sum(0)
        if normalize:
            divisor = torch.where(agrees, weight, 0.0).sum(0)
            consensus /= torch.where(divisor == 0, 1.0, divisor)
        out_P[elements].view(-1, BLOCK).copy_(base.addcmul(consensus, scale_B1[blocks]))


def task_vector_products(gradient_E: Tensor, base_E: Tensor, experts_KE: Tensor) -> Tensor:
    """Return <gradient, base> and <gradient, expert_k - base> of one tensor, shape (K+1,), float64.

    These are the derivatives of a loss in the rows of ``lincomb``'s weights: dL/dw[k] = <dL/dtheta, tau_k>.
    """
    products = torch.zeros(len(experts_KE) + 1, dtype=torch.float64, device=gradient_E.device)
    step = CHUNK_BLOCKS * BLOCK
    for start in range(0, len(gradient_E), step):
        here = slice(start, start + step)
        gradient, base = gradient_E[here].float(), base_E[here].float()
        products[0] += gradient @ base
        products[1:] += (experts_KE[:, here].float() - base) @ gradient
    return products
