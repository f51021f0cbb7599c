"""How a tile expression is run over flat buffers: compiled, in Triton, or eagerly in chunks that stay in the cache.

A tile expression is a pure function of blocks: (base (B, 1024), rows of experts, columns of numbers, one a block) ->
(B, 1024) float32. It is written once, in torch; the compiler fuses it into one pass over memory, and where there is
no compiler, or the model is too small to be worth the seconds of compiling, the same expression is walked in chunks
(temporaries of a whole model would cost ten times the merge itself in page faults). On CUDA the tiles that
``triton_tiles.py`` has twins of are launched there.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from evomerge.kernels.layout import BLOCK

CHUNK_BLOCKS = 256  # 1 MiB in float32: a handful of temporaries fit the L2 cache
CUDA_CHUNK_BLOCKS = 2**14  # 64 MiB: a GPU wants more to do at once
COMPILE_SUMS_FROM = 2**26  # elements; below, all candidates of a campaign together gain less than compiling takes
COMPILE_FROM = 2**22  # the same for longer expressions, which eagerly take tens of nanoseconds an element


class Tile(Protocol):
    """A tile expression; is_sum: it is no more than a weighted sum, and fast enough eagerly in all but large models."""

    is_sum: ClassVar[bool]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return merged_BE, float32, of (base_BE, rows, *columns_CB)."""

    def __hash__(self) -> int:
        """By value: tiles that are equal are compiled once."""


_flaws: dict[str, str] = {}
"""Device type -> why kernels run eagerly there."""


def path(device: torch.device, num_elements: int) -> str:
    """Say in words how a merge of that size is computed."""
    on_cuda = device.type == "cuda"
    if on_cuda and find_spec("triton") is None:
        return "eager kernels (Triton is not installed)"
    if not on_cuda and num_elements < COMPILE_FROM:
        return "eager kernels (small model)"
    if device.type in _flaws:
        return f"eager kernels ({_flaws[device.type]})"
    if not on_cuda and num_elements < COMPILE_SUMS_FROM:
        return "compiled kernels (eager ones for plain sums)"
    return "Triton kernels" if on_cuda else "compiled kernels"


def launch(
    tile: Tile,
    out_P: Tensor,
    runs: Sequence[slice],
    base_P: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
) -> None:
    """Write ``tile`` of the blocks of ``runs`` to ``out_P``, rounded once to its dtype.

    Shapes: rows (P,) each; columns (C, B) each, float32 or int32, on the buffers' device.
    """
    device = out_P.device.type
    if device == "cuda" and device not in _flaws:
        try:
            from evomerge.kernels import triton_tiles

            if isinstance(tile, triton_tiles.Tile):
                with torch.cuda.device(out_P.device):  # Triton launches on the current one
                    triton_tiles.launch(tile, out_P, runs, base_P, rows, columns)
                return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no Triton, or no C compiler for its launcher
            _flaws[device] = f"Triton failed: {type(error).__name__}"
    blocks_of = [buffer_P.view(-1, BLOCK) for buffer_P in (out_P, base_P, *rows)]
    is_worth_compiling = out_P.numel() >= (COMPILE_SUMS_FROM if tile.is_sum else COMPILE_FROM)
    for run in runs:
        # A tensor of one block would be compiled again, for that very size.
        if is_worth_compiling and run.stop - run.start > 1 and device not in _flaws:
            try:
                out, base, *held = (blocks[run] for blocks in blocks_of)
                _compiled(tile)(out, base, tuple(held), *(column_CB[:, run] for column_CB in columns))
                continue
            except Exception as error:  # whatever the compiler's stack raises: no compiler, no headers, a full disk
                _flaws[device] = f"compiling failed: {type(error).__name__}"
        step = CUDA_CHUNK_BLOCKS if device == "cuda" else CHUNK_BLOCKS
        for first in range(run.start, run.stop, step):
            chunk = slice(first, min(first + step, run.stop))
            out, base, *held = (blocks[chunk] for blocks in blocks_of)
            out.copy_(tile(base, tuple(held), *(column_CB[:, chunk] for column_CB in columns)))


@cache
def _compiled(tile: Tile) -> Callable[..., None]:
    from torch._dynamo import config as tracing
    from torch._inductor import config

    config.compile_threads = 1  # no pool of compiler processes for one or two kernels
    tracing.recompile_limit = 64  # of ``write``, which all tiles share: a campaign may choose among many operators

    def write(out: Tensor, *arguments: Any) -> None:
        out.copy_(tile(*arguments))

    # The thresholds keep the whole expression in one loop: beyond them intermediate tensors would be stored.
    options: dict[str, Any] = {
        "realize_opcount_threshold": 10_000,
        "realize_reads_threshold": 10_000,
        "cpp.dynamic_threads": True,
    }
    compiled: Callable[..., None] = torch.compile(write, fullgraph=True, dynamic=True, options=options)
    return compiled
