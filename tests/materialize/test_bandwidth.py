"""How long a merge takes at least."""

import math

import pytest
import torch
from pretend_gpu import GPU, PretendGpu

from evomerge.materialize.bandwidth import Bandwidth, measure_bandwidth, merge_seconds
from evomerge.materialize.residence import device_bytes

GB = 10**9


def test_all_that_is_held_is_moved_once() -> None:
    """7 billion bfloat16 numbers and three experts: 70 GB at 5 TB/s, 49 with 8 bits; or 70 on the host, and 14 shipped."""
    held = device_bytes(14 * GB, num_experts=3, element_bytes=2)
    seconds = merge_seconds(held, Bandwidth(device=5000 * GB, host=350 * GB, bus=50 * GB))
    assert seconds["resident"] == pytest.approx(0.014)
    assert seconds["int8"] == pytest.approx(0.0098, rel=0.01)
    assert seconds["host"] == pytest.approx(0.2 + 0.28)


def test_the_cpu_ships_nothing_but_to_itself() -> None:
    measured = measure_bandwidth(torch.device("cpu"))
    assert measured.device == measured.host > 0
    assert measured.bus == measured.host / 2
    assert math.isfinite(measured.host)


def test_another_device_has_its_own_and_the_way_to_it() -> None:
    with PretendGpu():
        measured = measure_bandwidth(GPU)
    assert min(measured.device, measured.host, measured.bus) > 0
