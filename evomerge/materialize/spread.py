"""A model on several devices: which of its modules lie where, and how tensors get from one device to the next.

As in transformers' device maps, modules that the model names as not to be split stay whole, and each device has a range
of them, in their order. What stands between two of them lies with the first. What is tied lies with what it is tied to,
so that there is one of it: a head tied to the embeddings is on their device.

A module's inputs are brought to its device before it runs. What a module that is itself divided gives out is brought to
the first device: there a caller finds it, whichever part of the model was called. Caches stay where layers fill them.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evomerge.errors import InputError
from evomerge.kernels.layout import BLOCK, Layout


class Room(NamedTuple):
    """A device, and how many bytes of a model may lie there."""

    device: torch.device
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a device holds of a model.

    tensors: numbers in the layout, ascending. modules lie there with all that is in them; of frames, whose modules may
    lie elsewhere, only what is their own.
    """

    device: torch.device
    tensors: tuple[int, ...]
    modules: tuple[str, ...]
    frames: tuple[str, ...] = ()


def spread(module: nn.Module, named: Mapping[str, Tensor], layout: Layout, rooms: Sequence[Room]) -> list[Share]:
    """Return what lies on each device: of each room about as much is filled. Devices of nothing are left out.

    named are the tensors of the layout. Of a single room it is not asked how large it is.
    Raises: InputError if a device has too little room, or the model cannot be divided.
    """
    if len(rooms) == 1:
        return [Share(rooms[0].device, tuple(range(len(layout.tensors))), ("",))]
    chunks = _Division(module, {id(named[tensor.name]): s for s, tensor in enumerate(layout.tensors)}).chunks
    blocks_S = torch.bincount(layout.block_segment, minlength=len(layout.tensors)).tolist()
    block_bytes = BLOCK * next(iter(named.values())).element_size()
    sizes = [block_bytes * sum(blocks_S[s] for s in chunk.tensors) for chunk in chunks]
    places = divide(sizes, [room.num_bytes for room in rooms])
    shares = []
    for number, room in enumerate(rooms):
        here = _Chunk()
        for chunk in (chunk for chunk, place in zip(chunks, places, strict=True) if place == number):
            here.tensors += chunk.tensors
            here.modules += chunk.modules
            here.frames += chunk.frames
        num_bytes = block_bytes * sum(blocks_S[s] for s in here.tensors)
        if num_bytes > room.num_bytes:
            raise InputError(
                f"device: {sum(sizes) / 1e9:.1f} GB of the merged model, spread over "
                f"{', '.join(str(room.device) for room in rooms)}, are {num_bytes / 1e9:.1f} GB on {room.device}, "
                f"expected at most {room.num_bytes / 1e9:.1f} of what is free there; give it more GPUs (device, "
                "workers.gpus), or merge on the CPU (device: cpu)"
            )
        if here.tensors:
            shares.append(Share(room.device, tuple(sorted(here.tensors)), tuple(here.modules), tuple(here.frames)))
    return shares


def divide(sizes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Return the room of each size, a range of them in each, such that the fullest room is as little filled as can be.

    It may be overfilled nevertheless.
    """

    def filled(share: float) -> list[int] | None:
        place, used, places = 0, 0, []
        for size in sizes:
            while used + size > share * rooms[place]:
                place, used = place + 1, 0
                if place == len(rooms):
                    return None
            used += size
            places.append(place)
        return places

    low, high = 0.0, 2.0 * sum(sizes) / max(1, rooms[0])
    best = [0] * len(sizes)
    for _ in range(64):
        middle = (low + high) / 2
        if (places := filled(middle)) is None:
            low = middle
        else:
            best, high = places, middle
    return best


def settle(module: nn.Module, shares: Sequence[Share]) -> None:
    """Bring what is not there yet to the shares' devices, and have inputs and outputs follow."""
    for share in shares:
        for name in share.modules:
            module.get_submodule(name).to(share.device)
        for name in share.frames:
            frame = module.get_submodule(name)
            for key, buffer in frame.named_buffers(recurse=False):
                setattr(frame, key, buffer.to(share.device))
    if len(shares) > 1:
        connect(module, shares)


def connect(module: nn.Module, shares: Sequence[Share]) -> None:
    """Have every module's inputs brought to its device, and what divided modules give out to the first."""
    homes: dict[str, set[int]] = {}  # module in which there are others -> the shares that these belong to
    for number, share in enumerate(shares):
        for name in share.modules:
            module.get_submodule(name).register_forward_pre_hook(partial(_bring_in, share.device), with_kwargs=True)
            steps = name.split(".")
            for depth in range(len(steps)):
                homes.setdefault(".".join(steps[:depth]), set()).add(number)
    for name, numbers in homes.items():
        if len(numbers) > 1:
            module.get_submodule(name).register_forward_hook(partial(_bring_out, shares[0].device))


def _bring_in(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return _moved(args, device), _moved(kwargs, device)


def _bring_out(device: torch.device, _: nn.Module, __: Any, output: Any) -> Any:
    return _moved(output, device)


def _moved(held: Any, device: torch.device) -> Any:
    """Return tensors, also those in tuples, lists and dicts, on a device; all else as it is, caches above all."""
    if isinstance(held, Tensor):
        return held.to(device)
    if isinstance(held, dict):  # as transformers' outputs are
        twin = copy(held)
        for key, value in held.items():
            twin[key] = _moved(value, device)
        return twin
    if isinstance(held, tuple | list):
        moved = [_moved(one, device) for one in held]
        return type(held)(*moved) if hasattr(held, "_fields") else type(held)(moved)
    return held


@dataclass(slots=True)
class _Chunk:
    """What a model is divided into: a module that is not to be split, and what follows it up to the next one."""

    tensors: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)


class _Division:
    """``chunks``: a model in its order, cut before every module that is not to be split.

    numbers: id of a tensor -> its place in the layout.
    Raises: InputError if the model does not say what must stay whole, or ties what would lie on several devices.
    """

    def __init__(self, module: nn.Module, numbers: Mapping[int, int]) -> None:
        self._kind, self._numbers = type(module).__name__, numbers
        self._whole = set(getattr(module, "_no_split_modules", None) or ())
        if not self._whole:
            raise self._error("does not say which of its modules must stay on one device")
        self.chunks = [_Chunk()]
        self._owners: dict[int, _Chunk] = {}
        self._seen: set[int] = set()
        self._walk(module, "")

    def _walk(self, part: nn.Module, name: str) -> None:
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        if type(part).__name__ in self._whole or not any(part.children()):
            self._put_module(part, name)
            return
        chunk, tensors = self.chunks[-1], [*part.parameters(False), *part.buffers(False)]
        for child, inner in part.named_children():
            self._walk(inner, f"{name}.{child}" if name else child)
        self._put(self._merged(tensors), chunk)  # what is not tied to a module's
        if tensors:
            chunk.frames.append(name)

    def _put_module(self, part: nn.Module, name: str) -> None:
        tensors = [*part.parameters(), *part.buffers()]
        merged = self._merged(tensors)
        tied = {id(self._owners[s]): self._owners[s] for s in merged if s in self._owners}
        if len(tied) > 1:
            raise self._error(f"ties {name} to modules that would lie on several devices")
        if type(part).__name__ in self._whole and not tied and self.chunks[-1].tensors:
            self.chunks.append(_Chunk())
        # What has nothing merged are tables that all layers read, as those of rotary embeddings.
        chunk = next(iter(tied.values()), self.chunks[-1] if merged else self.chunks[0])
        self._put(merged, chunk)
        if tensors:
            chunk.modules.append(name)

    def _merged(self, tensors: Iterable[Tensor]) -> list[int]:
        return list(dict.fromkeys(self._numbers[id(tensor)] for tensor in tensors if id(tensor) in self._numbers))

    def _put(self, merged: Sequence[int], chunk: _Chunk) -> None:
        chunk.tensors += [s for s in merged if s not in self._owners]
        for s in merged:
            self._owners.setdefault(s, chunk)

    def _error(self, what: str) -> InputError:
        advice = "give one GPU that holds it (device: cuda:0), or merge on the CPU (device: cpu)"
        return InputError(f"device: {self._kind} {what}, and cannot be spread; {advice}")
