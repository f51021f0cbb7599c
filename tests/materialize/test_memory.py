"""Memory that runs out is known by what really raises then."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from evomerge.errors import InputError
from evomerge.materialize.memory import fitting_memory, lacks_memory

TOO_MANY = 10**15


def raise_as_a_gpu_does() -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(TOO_MANY), lambda: np.empty(TOO_MANY), lambda: bytearray(TOO_MANY), raise_as_a_gpu_does],
)
def test_memory_that_runs_out_is_told_from_other_failures(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    assert lacks_memory(raised.value)
    told = "base and experts do not fit memory .*; choose another residence"
    with pytest.raises(InputError, match=told), fitting_memory("base and experts"):
        allocate()


def test_other_failures_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"), fitting_memory("base and experts"):
        torch.ones(2, 3) @ torch.ones(2, 3)
