"""The numbers of given ranks among very many, exactly, without sorting them or holding them together.

Shape letters: R rows, each with statistics of its own; E numbers of a row in one piece; Q asked ranks.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

HALF = 2**16


def order_statistics(sweep: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> Tensor:
    """Return the numbers of the ranks (0 is the smallest) of every row, (R, Q) float32.

    ``sweep()`` yields the rows in pieces (R, E), finite float32; it is called twice. A float's bits, read as an
    integer, sort as the float does: the first sweep counts their upper halves and so finds the 65,536th part of the
    number line in which a rank lies, the second counts the lower halves there.
    """
    upper_RN: Tensor | None = None
    for piece in sweep():
        counts_RN = _histograms(_sortable(piece) >> 16, -HALF // 2)
        upper_RN = counts_RN if upper_RN is None else upper_RN + counts_RN
    assert upper_RN is not None
    ends_RN = upper_RN.cumsum(1)
    asked_RQ = torch.tensor(ranks, device=ends_RN.device).expand(len(ends_RN), -1).contiguous()
    parts_RQ = torch.searchsorted(ends_RN, asked_RQ, right=True)
    within_RQ = asked_RQ - (ends_RN - upper_RN).gather(1, parts_RQ)

    lower_RQN = torch.zeros(*asked_RQ.shape, HALF, dtype=torch.int64, device=ends_RN.device)
    for piece in sweep():
        for r, codes_E in enumerate(_sortable(piece)):
            for q, part in enumerate(parts_RQ[r]):
                found = codes_E[codes_E >> 16 == part - HALF // 2]
                lower_RQN[r, q] += _histograms(found[None] & (HALF - 1), 0)[0]
    last_RQ = torch.searchsorted(lower_RQN.cumsum(2), within_RQ[..., None], right=True)[..., 0]
    codes_RQ = (((parts_RQ - HALF // 2) << 16) | last_RQ).to(torch.int32)
    return _flip(codes_RQ).view(torch.float32)


def _sortable(numbers: Tensor) -> Tensor:
    """Return int32 that sort as the float32 do."""
    return _flip(numbers.contiguous().view(torch.int32))


def _flip(bits: Tensor) -> Tensor:
    """Turn the order of the negative ones round: their bits grow with the magnitude."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _histograms(codes_RE: Tensor, first: int) -> Tensor:
    """Count each of the 65,536 integers from ``first`` on, (R, 65,536)."""
    return torch.stack([torch.bincount(codes_E - first, minlength=HALF) for codes_E in codes_RE])
