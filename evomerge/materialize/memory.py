"""When memory runs out, of a GPU or of the machine."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from evomerge.errors import InputError

NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""What torch's plain RuntimeErrors say where it has no class for it: on the CPU, on MPS, within a library of CUDA's."""


def lacks_memory(error: Exception) -> bool:
    """Whether this was raised because memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def free_memory() -> None:
    """Give back what is held for nothing; call when no exception is at hand, whose frames would hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def fitting_memory(what: str) -> Iterator[None]:
    """Raise InputError where memory runs out."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise InputError(
            f"{what} do not fit memory ({' '.join(str(error).split())[:300]}); choose another residence, fewer workers "
            "on a machine, or dtype: bfloat16"
        ) from error
