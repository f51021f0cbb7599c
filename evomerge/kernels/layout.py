"""The flat layout: where each tensor lies in a buffer that holds a whole checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.records import TensorIndex

BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor starts on a block of 1,024 elements; the padding is zero.

    segments are the tensors' elements without padding; block_segment (B,) says which tensor a block belongs to, and
    first_block (S,) with which block a tensor starts.
    """

    tensors: TensorIndex
    segments: tuple[slice, ...]
    block_segment: Tensor
    first_block: Tensor

    @classmethod
    def of(cls, tensors: TensorIndex) -> "Layout":
        """Lay the tensors out in their order."""
        segments, num_blocks = [], []
        start = 0
        for tensor in tensors:
            segments.append(slice(start, start + tensor.num_elements))
            num_blocks.append(-(-tensor.num_elements // BLOCK))
            start += num_blocks[-1] * BLOCK
        blocks = torch.tensor(num_blocks, dtype=torch.int64)
        block_segment = torch.arange(len(tensors)).repeat_interleave(blocks)
        return cls(tensors, tuple(segments), block_segment, blocks.cumsum(0) - blocks)

    @property
    def num_padded(self) -> int:
        """Number of elements of a buffer, padding included (P)."""
        return len(self.block_segment) * BLOCK

    @torch.no_grad()
    def flatten(self, named: Mapping[str, Tensor], out_P: Tensor) -> None:
        """Copy the named tensors to their places."""
        for tensor, segment in zip(self.tensors, self.segments, strict=True):
            out_P[segment].copy_(named[tensor.name].reshape(-1))

    def views(self, buffer_P: Tensor) -> dict[str, Tensor]:
        """Return each tensor as a view of the buffer."""
        return {
            tensor.name: buffer_P[segment].view(tensor.shape)
            for tensor, segment in zip(self.tensors, self.segments, strict=True)
        }

    def spread(self, group_of: Mapping[str, int], matrix_KG: Tensor) -> Tensor:
        """Return (K, S) from (K, G): each tensor takes its group's column."""
        columns = torch.tensor([group_of[tensor.name] for tensor in self.tensors])
        return matrix_KG[:, columns]

    def runs(self, changed: Sequence[int] | None) -> list[slice]:
        """Return the blocks of the given tensors (None: of all) as few slices of blocks, in order."""
        if changed is None:
            return [slice(0, len(self.block_segment))]
        runs: list[slice] = []
        ends = [*self.first_block[1:].tolist(), len(self.block_segment)]
        for s in sorted(changed):
            start, stop = int(self.first_block[s]), int(ends[s])
            if runs and runs[-1].stop == start:
                runs[-1] = slice(runs[-1].start, stop)
            elif stop > start:
                runs.append(slice(start, stop))
        return runs

    def first_non_finite(self, buffer_P: Tensor, changed: Sequence[int] | None = None) -> str | None:
        """Name the first tensor (of the given ones) that holds a NaN or an infinity, or None."""
        # A NaN or an infinity makes the sum one too, in a single pass; a sum that overflowed is found out below.
        if all(bool(buffer_P[run.start * BLOCK : run.stop * BLOCK].sum().isfinite()) for run in self.runs(changed)):
            return None
        pairs = zip(self.tensors, self.segments, strict=True)
        return next((tensor.name for tensor, place in pairs if not bool(buffer_P[place].isfinite().all())), None)
