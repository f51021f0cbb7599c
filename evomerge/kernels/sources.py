"""The sources of a merge: base and experts in flat buffers, whatever form an expert is held in.

Shape letters: K experts, S tensors, P padded elements, B blocks, E elements of one tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from evomerge.kernels.layout import BLOCK, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """An expert as a flat buffer: the checkpoint itself, or its task vector.

    scales_B: the float32 factor of each block of the task vector, or None for 1: of one held in int8, and 0 where an
    expert takes no part. Experts that share a buffer are read once.
    """

    buffer_P: Tensor
    is_task_vector: bool = False
    scales_B: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """An expert as an adapter: of each tensor s in ``factors`` the task vector is B @ A, of the others zero.

    factors maps a tensor's number to float32 (B (rows, rank), A (rank, columns)), the adapter's scaling within B.
    The task vector of an (out, in) matrix has the product's shape; a tensor of other rank is its reshaping.
    scalings are those within the factors; a tensor that has none is a whole task vector, B (elements, 1) and A (1, 1).
    transposed are the tensors that are stored as (in, out): their factors are A^T and B^T, the scaling in the second.
    """

    factors: Mapping[int, tuple[Tensor, Tensor]]
    scalings: Mapping[int, float] = field(default_factory=dict)
    transposed: frozenset[int] = frozenset()


Expert = Dense | LowRank


@dataclass(frozen=True, eq=False)
class Sources:
    """Base and experts. An operator reads tensors through the methods; kernels read the buffers.

    What ``base`` and ``expert`` return may be the buffer itself; a ``task_vector`` is the caller's own.
    """

    layout: Layout
    base_P: Tensor
    experts: tuple[Expert, ...]

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.experts)

    @property
    def num_tensors(self) -> int:
        """S."""
        return len(self.layout.tensors)

    @property
    def device(self) -> torch.device:
        """Where base and experts are."""
        return self.base_P.device

    @cached_property
    def block_segment(self) -> Tensor:
        """The layout's, on the device."""
        return self.layout.block_segment.to(self.device)

    def spread(self, matrix_CS: Tensor) -> Tensor:
        """Return (C, B) on the device from (C, S): every block takes its tensor's column.

        A block's numbers lie side by side in memory: gathered, and read by a kernel, in one go.
        """
        return matrix_CS.T.contiguous().to(self.device).index_select(0, self.block_segment).T

    def base(self, s: int, rows: slice | None = None) -> Tensor:
        """Return the base's tensor s, float32: in its shape, or so many rows of it as a matrix."""
        return self._shaped(self.base_P[self._place(s, rows)].float(), s, rows)

    def task_vector(self, k: int, s: int, rows: slice | None = None) -> Tensor:
        """Return expert k's task vector of tensor s, float32: in its shape, or so many rows of it as a matrix."""
        expert, place = self.experts[k], self._place(s, rows)
        if isinstance(expert, LowRank):
            if s not in expert.factors:
                return self._shaped(torch.zeros(place.stop - place.start, device=self.device), s, rows)
            b, a = expert.factors[s]
            if rows is not None:  # of a tensor held whole, B has a row for every element
                step = len(b) // self.layout.tensors[s].matrix[0]
                b = b[rows.start * step : rows.stop * step]
            return self._shaped(b @ a, s, rows)
        held_E = expert.buffer_P[place].to(torch.float32, copy=True)
        if not expert.is_task_vector:
            held_E -= self.base_P[place].float()
        if expert.scales_B is not None:
            first, before = divmod(place.start, BLOCK)
            scales_B = expert.scales_B[first : -(-place.stop // BLOCK)]
            held_E *= scales_B.repeat_interleave(BLOCK)[before : before + len(held_E)]
        return self._shaped(held_E, s, rows)

    def expert(self, k: int, s: int, rows: slice | None = None) -> Tensor:
        """Return expert k's tensor s, float32: in its shape, or so many rows of it as a matrix."""
        expert = self.experts[k]
        if isinstance(expert, Dense) and not expert.is_task_vector and expert.scales_B is None:
            return self._shaped(expert.buffer_P[self._place(s, rows)].float(), s, rows)
        return self.base(s, rows) + self.task_vector(k, s, rows)

    def task_vectors(self, s: int, rows: slice) -> Tensor:
        """Return so many rows of all experts' task vectors of tensor s, (K, rows, columns), float32."""
        return torch.stack([self.task_vector(k, s, rows) for k in range(self.num_experts)])

    def absolute_sums(self, exponent: int) -> Tensor:
        """Return the sum of |entry|^exponent over every task vector's tensors, (K, S), float64 on the CPU.

        One pass over the sources; of an adapter only what it changes is multiplied out, piece by piece.
        """
        sums_KS = torch.zeros(self.num_experts, self.num_tensors, dtype=torch.float64, device=self.device)
        for s in range(self.num_tensors):
            moving = [k for k, expert in enumerate(self.experts) if isinstance(expert, Dense) or s in expert.factors]
            for rows, _ in self.chunks(s) if moving else ():
                for k in moving:
                    sums_KS[k, s] += self.task_vector(k, s, rows).double().abs().pow(exponent).sum()
        return sums_KS.cpu()

    def chunks(self, s: int) -> Iterator[tuple[slice, slice]]:
        """Walk tensor s as a matrix, in rows whose temporaries fit the cache: (rows, their place in the buffers)."""
        limit = 2**24 if self.device.type == "cuda" else 2**16  # of a GPU, few launches
        num_rows, num_columns = self.layout.tensors[s].matrix
        step = max(1, limit // max(1, num_columns))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield rows, self._place(s, rows)

    def densified(self) -> "Sources":
        """Return the same sources with every adapter as a task vector, rounded to the base's dtype."""
        experts: list[Expert] = []
        for k, expert in enumerate(self.experts):
            if isinstance(expert, LowRank):
                buffer_P = torch.zeros_like(self.base_P)
                for s in expert.factors:
                    buffer_P[self.layout.segments[s]] = self.task_vector(k, s).flatten().to(buffer_P.dtype)
                expert = Dense(buffer_P, is_task_vector=True)  # noqa: PLW2901
            experts.append(expert)
        return replace(self, experts=tuple(experts))

    def _place(self, s: int, rows: slice | None) -> slice:
        segment = self.layout.segments[s]
        if rows is None:
            return segment
        _, width = self.layout.tensors[s].matrix
        return slice(segment.start + rows.start * width, segment.start + rows.stop * width)

    def _shaped(self, held: Tensor, s: int, rows: slice | None) -> Tensor:
        tensor = self.layout.tensors[s]
        return held.view(tensor.shape if rows is None else (rows.stop - rows.start, tensor.matrix[1]))
