"""How long a merge takes at least: what it moves through memory, by how fast memory moves it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.materialize.residence import Residence

NUM_BYTES = 2**27  # of the buffers that are copied: more than caches hold
NUM_COPIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes a second, those that are read and those that are written counted.

    device: of the memory where the merged model lies; host: of the host's; bus: from the host to the device.
    """

    device: float
    host: float
    bus: float


def merge_seconds(held_bytes: Mapping[Residence, int], bandwidth: Bandwidth) -> dict[Residence, float]:
    """Return what each residence takes, in seconds, to merge all tensors once by a weighted sum.

    Base and experts are read once, and the model is written once: whatever is held is moved once. ``host`` does so on
    the host and ships the result. That is a lower bound: nothing but moving counts, and rules that trim or vote
    compute more. held_bytes: on the device, as ``device_bytes`` returns them.
    """
    return {
        "resident": held_bytes["resident"] / bandwidth.device,
        "int8": held_bytes["int8"] / bandwidth.device,
        "host": held_bytes["resident"] / bandwidth.host + held_bytes["host"] / bandwidth.bus,
    }


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Time copies within the host and, if that is another place, within the device and to it: some tenths of a second.

    The fastest of three counts; the host's with as many threads as torch has.
    """
    held = torch.ones(NUM_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_host = 2 * NUM_BYTES / _copy_seconds(held, torch.device("cpu"))
    if device.type == "cpu":
        return Bandwidth(device=on_host, host=on_host, bus=on_host / 2)
    return Bandwidth(
        device=2 * NUM_BYTES / _copy_seconds(held.to(device), device),
        host=on_host,
        bus=NUM_BYTES / _copy_seconds(held, device),
    )


def _copy_seconds(source: Tensor, device: torch.device) -> float:
    target = torch.empty(NUM_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(NUM_COPIES):
        begin = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # a device has finished when it can be read
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
