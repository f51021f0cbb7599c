"""The tiles of ``tiles.py`` in Triton: on a CUDA device, one launch a candidate.

A program merges one block of 1,024 elements, whose numbers it reads from the columns. Every sum, product and quotient
is rounded as the torch expression rounds it (no fused multiply-add, IEEE division), in the same order: a merge has the
same bits on the GPU as on the CPU, and a trim or an election never falls otherwise. The merge is bound by memory; the
arithmetic costs nothing.

Importing this needs Triton, which comes with torch's CUDA builds; ``launch.py`` imports it where there is a GPU.
Triton's interpreter runs the same code on the CPU (TRITON_INTERPRET=1, set before Triton is imported).
Shape letters: K experts, B blocks, C columns; inside a kernel E elements of one block.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from evomerge.kernels import tiles as kernels
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.tiles import KeptTile, LincombTile, MaskedTile

Tile = LincombTile | MaskedTile | KeptTile

_BLOCK = tl.constexpr(BLOCK)
_FLOATS = tl.constexpr(MaskedTile.FLOATS)
_INTS = tl.constexpr(MaskedTile.INTS)
_GOLDEN = tl.constexpr(kernels.GOLDEN)
_MIX_1 = tl.constexpr(kernels._MIX[0])
_MIX_2 = tl.constexpr(kernels._MIX[1])


def launch(
    tile: Tile, out_P: Tensor, runs: Sequence[slice], base_P: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> None:
    """Write ``tile`` of the blocks of ``runs`` to ``out_P``, as ``launch.launch`` does; rows of any dtypes."""
    num_blocks = sum(run.stop - run.start for run in runs)
    if num_blocks == 0:
        return
    blocks = None  # of a whole model: a program's number is its block's
    if num_blocks * BLOCK < out_P.numel():
        numbers = [torch.arange(run.start, run.stop, dtype=torch.int32, device=out_P.device) for run in runs]
        blocks = torch.cat(numbers)
    columns = [column_CB.contiguous() for column_CB in columns]
    strides = [column_CB.stride(0) for column_CB in columns]
    buffers = (out_P, blocks, base_P, tuple(rows))
    if isinstance(tile, LincombTile):
        _lincomb[(num_blocks,)](*buffers, *columns, *strides, enable_fp_fusion=False)
        return
    masked = tile.masked if isinstance(tile, KeptTile) else tile
    _masked[(num_blocks,)](
        *buffers, *columns, *strides, masked.are_vectors, masked.keep, masked.unbiased, masked.scaled, masked.gained,
        masked.vote.elect, masked.vote.divide, masked.vote.zero, isinstance(tile, KeptTile), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _lincomb(out, blocks, base, rows, floats, floats_stride: tl.int64):
    """``LincombTile``."""
    block = tl.program_id(0) if blocks is None else tl.load(blocks + tl.program_id(0))
    at_E = block.to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)  # a large model has more than 2^31 elements
    floats += block
    total_E = tl.load(base + at_E).to(tl.float32) * tl.load(floats)
    for i in tl.static_range(len(rows)):
        total_E += tl.load(rows[i] + at_E).to(tl.float32) * tl.load(floats + (1 + i) * floats_stride)
    tl.store(out + at_E, total_E.to(out.dtype.element_ty))


@triton.jit
def _masked(
    out, blocks, base, rows, floats, ints, floats_stride: tl.int64, ints_stride: tl.int64,
    ARE_VECTORS: tl.constexpr, KEEP: tl.constexpr, UNBIASED: tl.constexpr, SCALED: tl.constexpr, GAINED: tl.constexpr,
    ELECT: tl.constexpr, DIVIDE: tl.constexpr, ZERO: tl.constexpr, KEPT_ALONE: tl.constexpr,
):  # fmt: skip
    """``MaskedTile``, or ``KeptTile``: the combination by itself."""
    block = tl.program_id(0) if blocks is None else tl.load(blocks + tl.program_id(0))
    column_E = tl.arange(0, _BLOCK)
    at_E = block.to(tl.int64) * _BLOCK + column_E
    floats += block
    ints += block
    base_E = tl.load(base + at_E).to(tl.float32)
    tie_E = column_E * _GOLDEN + tl.load(ints)
    zero_E = tl.full((_BLOCK,), 0.0, tl.float32)
    variance_E = zero_E
    if KEEP == "variance":
        variance_E = _variance(base_E, rows, at_E, floats, floats_stride, ARE_VECTORS, SCALED)
    # Triton keeps no list of blocks. So both sides of the election are summed, and what each is divided by.
    vote_E, divisor_E = zero_E, zero_E
    positive_E, negative_E, positive_divisor_E, negative_divisor_E = zero_E, zero_E, zero_E, zero_E
    for k in tl.static_range(len(ARE_VECTORS)):
        numbers = floats + (1 + k * _FLOATS) * floats_stride
        draws = ints + (1 + k * _INTS) * ints_stride
        weight = tl.load(numbers)
        vector_E = _task_vector(base_E, rows[k], at_E, numbers + 2 * floats_stride, ARE_VECTORS[k], SCALED)
        size_E = variance_E if KEEP == "variance" else vector_E
        if GAINED:
            vector_E *= tl.load(numbers + floats_stride)
        if KEEP == "uniform":
            kept_E = _hash32(column_E ^ tl.load(draws)) <= tl.load(draws + ints_stride)
        elif KEEP == "rank":
            rank_E = tl.load(rows[len(ARE_VECTORS) + k] + at_E).to(tl.float32)
            share = tl.load(draws + ints_stride).to(tl.float32, bitcast=True)
            probability_E = share + tl.load(numbers + 7 * floats_stride) * rank_E
            draw_E = _hash32(column_E ^ tl.load(draws))
            kept_E = ((draw_E >> 8) + 8388608).to(tl.float32) * 5.9604644775390625e-08 < probability_E
            if UNBIASED:
                vector_E = tl.div_rn(vector_E, probability_E)
        else:
            kept_E = _reaches(size_E, tie_E, numbers + 3 * floats_stride, floats_stride, draws + ints_stride)
            if KEEP == "window":
                tops = numbers + 5 * floats_stride
                kept_E = kept_E & ~_reaches(size_E, tie_E, tops, floats_stride, draws + 2 * ints_stride)
        entry_E = tl.where(kept_E, vector_E, 0.0)
        term_E = entry_E * weight
        side_E = entry_E if ELECT == "unweighted" else term_E
        if ELECT == "count":
            vote_E += tl.where(side_E > 0, 1.0, 0.0) - tl.where(side_E < 0, 1.0, 0.0)
        else:
            vote_E += side_E
        share = weight if DIVIDE == "weights" else 1.0
        divisor_E += tl.where(term_E != 0, share, 0.0)
        positive_E += tl.where(side_E > 0, term_E, 0.0)
        negative_E += tl.where(side_E < 0, term_E, 0.0)
        positive_divisor_E += tl.where(side_E > 0, share, 0.0)
        negative_divisor_E += tl.where(side_E < 0, share, 0.0)
    total_E = vote_E
    if ELECT != "no":
        total_E = tl.where(vote_E >= 0, positive_E, negative_E)
        divisor_E = tl.where(vote_E >= 0, positive_divisor_E, negative_divisor_E)
        if ZERO == "none":
            total_E = tl.where(vote_E == 0, 0.0, total_E)
    if DIVIDE != "no":
        total_E = tl.div_rn(total_E, tl.where(divisor_E == 0, 1.0, divisor_E))
    merged_E = total_E if KEPT_ALONE else base_E + tl.load(floats) * total_E
    tl.store(out + at_E, merged_E.to(out.dtype.element_ty))


@triton.jit
def _task_vector(base_E, row, at_E, scale, IS_VECTOR: tl.constexpr, SCALED: tl.constexpr):
    held_E = tl.load(row + at_E).to(tl.float32)
    if SCALED:
        held_E *= tl.load(scale)
    return held_E if IS_VECTOR else held_E - base_E


@triton.jit
def _variance(base_E, rows, at_E, floats, floats_stride, ARE_VECTORS: tl.constexpr, SCALED: tl.constexpr):
    # The rows are read once for the mean, once for the deviations, and again for the merge, from the cache.
    NUM: tl.constexpr = len(ARE_VECTORS)
    scales = floats + 3 * floats_stride
    sum_E = tl.full((_BLOCK,), 0.0, tl.float32)
    for k in tl.static_range(NUM):
        sum_E += _task_vector(base_E, rows[k], at_E, scales + k * _FLOATS * floats_stride, ARE_VECTORS[k], SCALED)
    mean_E = sum_E * (1.0 / NUM)
    squares_E = tl.full((_BLOCK,), 0.0, tl.float32)
    for k in tl.static_range(NUM):
        scale = scales + k * _FLOATS * floats_stride
        deviation_E = _task_vector(base_E, rows[k], at_E, scale, ARE_VECTORS[k], SCALED) - mean_E
        squares_E += deviation_E * deviation_E
    return squares_E * (1.0 / NUM)


@triton.jit
def _reaches(size_E, tie_E, thresholds, stride, cut):
    low, high = tl.load(thresholds), tl.load(thresholds + stride)
    return tl.abs(size_E) >= tl.where(tie_E <= tl.load(cut), low, high)


@triton.jit
def _hash32(number):
    number = (number ^ ((number >> 16) & 0xFFFF)) * _MIX_1
    number = (number ^ ((number >> 15) & 0x1FFFF)) * _MIX_2
    return number ^ ((number >> 16) & 0xFFFF)
