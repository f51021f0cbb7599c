"""Where base and experts are held while the merged model is on a GPU.

resident  base, experts and the merged model on the GPU: (K + 2) times the model, and a candidate takes milliseconds
int8      base and merged model as they are, the task vectors in 8 bits: half of that (bfloat16, large K)
host      base and experts on the host, which merges and ships the result: one model on the GPU, or on several

``auto`` takes resident where it fits, else host. It never takes int8, which rounds the task vectors: the same campaign
would mean another merge on a smaller GPU. Whoever asks for int8 gets it on every device, and it is part of the recipe.
Resident and host differ in time only. A model that lies on several GPUs is always merged on the host.

Shape letters: P padded elements, B blocks, E elements of a block.
"""

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from evomerge.errors import CampaignError, InputError
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Dense
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.merge import Source
from evomerge.materialize.spread import Room

Residence = Literal["resident", "int8", "host"]
AskedResidence = Literal["auto", "resident", "int8", "host"]

AUTO = "auto"
EVALUATION_SHARE = 0.25
"""Of the free memory: left for activations, caches of generation, and what an operator prepares."""
CHUNK_BLOCKS = 2**12
INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class Settled:
    """What a place came to: where base and experts are, and the devices of the merged model with their room."""

    residence: Residence
    rooms: tuple[Room, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The device of the merged model, and what was asked for base and experts.

    device: one, several over which the model is spread (``cuda:0,cuda:1``), or ``auto``: one GPU if that is enough,
    else all that this process sees. factored: adapters stay factors, since no operator needs their tensors whole.
    keeps_merge: paths are laid through the merged model, which stays as it is beside what they scale.
    """

    device: str = "cpu"
    residence: AskedResidence = "auto"
    factored: bool = True
    keeps_merge: bool = False

    def needed_bytes(self, num_elements: int, element_bytes: int, experts: Sequence[Source]) -> dict[Residence, int]:
        """Return what each residence holds on the device; what operators prepare is not counted."""
        adapters = [expert for expert in experts if isinstance(expert, Adapter)]
        num_whole = len(experts) - (len(adapters) if self.factored else 0)
        factor_bytes = sum(adapter.size_bytes for adapter in adapters)
        needed = device_bytes(num_elements * element_bytes, num_whole, element_bytes, factor_bytes)
        if self.keeps_merge:
            needed["resident"] += num_elements * element_bytes
        return needed

    def choose(self, needed_bytes: Mapping[Residence, int]) -> Settled:
        """Return where base and experts go, and the model. On one CPU all is resident, or int8 if that was asked for.

        Raises: InputError if what was asked for does not fit.
        """
        devices = self.devices
        if torch.cuda.is_initialized():
            gc.collect()  # what an earlier model of this process has left there
            torch.cuda.empty_cache()
        free = [_free_bytes(device) for device in devices]
        rooms = tuple(map(Room, devices, (_room(self.residence, num_bytes) for num_bytes in free)))
        if len(rooms) > 1 and not (self.device == AUTO and self._fits_one(needed_bytes, rooms[0])):
            if self.residence not in {"auto", "host"}:
                raise InputError(
                    f"residence: {self.residence}: base and experts lie on one device; expected residence: host or "
                    f"auto for a model on {self.device}"
                )
            return Settled("host", rooms)
        if devices[0].type != "cuda":
            return Settled("int8" if self.residence == "int8" else "resident", rooms[:1])
        return Settled(choose_residence(self.residence, needed_bytes, free[0]), rooms[:1])

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the model may lie on."""
        if self.device == AUTO:
            return tuple(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
        return tuple(map(torch.device, self.device.split(",")))

    def _fits_one(self, needed_bytes: Mapping[Residence, int], room: Room) -> bool:
        """Whether one GPU is enough, or can alone be meant."""
        return self.residence not in {"auto", "host"} or needed_bytes["host"] <= room.num_bytes


ON_THE_CPU = Place()


def choose_device(asked: str) -> str:
    """Return the device to merge and score on, as ``Place`` has it: what was asked for, or GPUs where there are some.

    Raises: CampaignError for a device that is not there, and for several that are not GPUs, each its own.
    """
    if asked == AUTO:
        return "cpu" if not torch.cuda.is_available() else AUTO if torch.cuda.device_count() > 1 else "cuda"
    found = []
    for device in asked.split(","):
        try:
            found.append(torch.empty(1, device=device.strip()).device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise CampaignError(f"device: {asked!r} cannot be used here ({reason}); try auto or cpu") from error
    # The CPU may be named twice: that shows without any GPU what a spread model does.
    if len({device.type for device in found}) > 1 or (found[0].type == "cuda" and len(set(found)) < len(found)):
        raise CampaignError(
            f"device: expected auto, one device, or different GPUs to spread the model over (cuda:0,cuda:1), found "
            f"{asked!r}"
        )
    return ",".join(map(str, found))


def device_bytes(model_bytes: int, num_experts: int, element_bytes: int, factor_bytes: int = 0) -> dict[Residence, int]:
    """Return what each residence holds on the GPU.

    An element of the model has ``element_bytes``; num_experts are held whole, and adapters' factors come on top.
    """
    int8_bytes = round(model_bytes / element_bytes * (1 + 4 / BLOCK))  # and a float32 factor for each block
    return {
        "resident": (num_experts + 2) * model_bytes + factor_bytes,
        "int8": 2 * model_bytes + num_experts * int8_bytes + factor_bytes,
        "host": model_bytes,
    }


def choose_residence(asked: AskedResidence, needed_bytes: Mapping[Residence, int], free_bytes: int) -> Residence:
    """Return what was asked for if it fits into the GPU's free memory; of ``auto``, what leaves room to evaluate.

    Raises: InputError that says what is needed, what is free, and what would fit.
    """
    room = _room(asked, free_bytes)
    preferred: tuple[Residence, ...] = ("resident", "host") if asked == "auto" else (asked,)
    for residence in preferred:
        if needed_bytes[residence] <= room:
            return residence
    fitting = [residence for residence in get_args(Residence) if needed_bytes[residence] <= room]
    advice = (
        f"residence: {' or '.join(fitting)} fits"
        if fitting
        else "spread it over several GPUs (residence: host, device: auto, workers.gpus), or use the CPU (device: cpu)"
    )
    raise InputError(
        f"residence: {preferred[-1]} needs {needed_bytes[preferred[-1]] / 1e9:.1f} GB on the GPU, expected at most "
        f"{room / 1e9:.1f} of the {free_bytes / 1e9:.1f} GB that are free; {advice}"
    )


def _room(asked: AskedResidence, free_bytes: int) -> int:
    """Return how much of the free memory may be taken: all of it where a person decides."""
    return int((1 - EVALUATION_SHARE) * free_bytes) if asked == "auto" else free_bytes


def _free_bytes(device: torch.device) -> int:
    """Return a GPU's free memory; of the CPU's it is not asked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize


def to_int8(expert: Dense, base_P: Tensor) -> Dense:
    """Return an expert's task vector in 8 bits, on the base's device: symmetric, a float32 factor for each block.

    An entry is off by at most 1/254 of the largest of its block; with normally distributed task vectors that is
    some 0.7 % of their norm. Of a checkpoint the task vector is taken in float32.
    Reference: Dettmers et al. 2022, arxiv.org/abs/2110.02861, section 2.1 (block-wise), with linear codes.
    """
    codes_P = torch.empty(len(base_P), dtype=torch.int8, device=base_P.device)
    held, base, codes = (buffer_P.view(-1, BLOCK) for buffer_P in (expert.buffer_P, base_P, codes_P))
    scales_B = torch.empty(len(codes), device=base_P.device)
    for first in range(0, len(codes), CHUNK_BLOCKS):  # a GPU that is short of memory has none for a whole float32 copy
        blocks = slice(first, first + CHUNK_BLOCKS)
        vector_BE = held[blocks].to(base_P.device, torch.float32, copy=True)
        if not expert.is_task_vector:
            vector_BE -= base[blocks].float()
        scales_B[blocks] = vector_BE.abs().amax(1) * (1 / INT8_MAX)  # a factor: the same bits on a GPU
        factor_B = torch.where(scales_B[blocks] > 0, scales_B[blocks], 1.0)
        codes[blocks] = (vector_BE / factor_B[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Dense(codes_P, is_task_vector=True, scales_B=scales_B)
