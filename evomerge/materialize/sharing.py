"""Base and experts in memory that several workers of a machine read, instead of a copy in each.

What is shared are the flat buffers as arrays of bytes, in the order base, experts; a process that is handed them reads
no file. Adapters are small and stay each worker's own.

Shape letters: P padded elements, B blocks.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.kernels.layout import Layout
from evomerge.kernels.sources import Dense, Expert, LowRank, Sources

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """The buffers of base and experts, and the hash of each checkpoint's tensors, by its folder."""

    hashes: Mapping[str, str]
    buffers: Sequence[Bytes]


def buffers_of(sources: Sources) -> list[Bytes]:
    """Return what of the sources can be shared; nothing if they lie on a GPU, which each worker fills by itself."""
    if sources.device.type != "cpu":
        return []
    held = [sources.base_P]
    for expert in sources.experts:
        if isinstance(expert, Dense):
            held += [expert.buffer_P] if expert.scales_B is None else [expert.buffer_P, expert.scales_B]
    return [tensor.view(torch.uint8).numpy() for tensor in held]


def base_of(shared: Shared, dtype: torch.dtype) -> Tensor:
    """Return the base's buffer (P,), which must not be written to."""
    return _tensor(shared.buffers[0], dtype)


def sources_of(
    shared: Shared, layout: Layout, base_P: Tensor, adapters: Sequence[LowRank | None], *, int8: bool
) -> Sources:
    """Return the sources of shared buffers; adapters holds the experts that are none of them, in their places.

    base_P is as the residence has it: experts come to its device. int8: experts are task vectors in 8 bits.
    """
    buffers = iter(shared.buffers[1:])
    experts = [adapter or _dense(buffers, base_P, int8=int8) for adapter in adapters]
    return Sources(layout, base_P, tuple(experts))


def _dense(buffers: Iterator[Bytes], base_P: Tensor, *, int8: bool) -> Expert:
    if not int8:
        return Dense(_tensor(next(buffers), base_P.dtype).to(base_P.device))
    codes_P, scales_B = _tensor(next(buffers), torch.int8), _tensor(next(buffers), torch.float32)
    return Dense(codes_P.to(base_P.device), is_task_vector=True, scales_B=scales_B.to(base_P.device))


def _tensor(buffer: Bytes, dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        return torch.from_numpy(buffer).view(dtype)
