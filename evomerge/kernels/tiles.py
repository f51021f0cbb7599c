"""The tiles: what is computed of each block of 1,024 elements, written once in torch (see ``launch.py``).

Shape letters: K experts, B blocks, E elements of a block, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LincombTile:
    """sum of base and rows, each times its column of ``floats_CB``."""

    is_sum: ClassVar[bool] = True

    def __call__(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor) -> Tensor:
        """Return base * floats[0] + sum_i rows[i] * floats[1 + i]."""
        total = base.float() * floats_CB[0][:, None]
        for row, factor_B in zip(rows, floats_CB[1:].unbind(0), strict=True):
            total = total + row.float() * factor_B[:, None]
        return total


Keep = Literal["magnitude", "window", "uniform", "rank", "variance"]
Elect = Literal["no", "weighted", "unweighted", "count"]
Divide = Literal["no", "weights", "count"]


@dataclass(frozen=True)
class Vote:
    """How kept entries are combined.

    elect: sum all of them, or only those whose sign is that of the sum of the weighted entries, of the unweighted
    ones, or of the count of signs. zero: a vote of zero elects the positive sign, or none, and nothing is summed.
    divide: by nothing, by the summed weights of what was summed, or by their number (an empty sum by 1).
    """

    elect: Elect = "no"
    divide: Divide = "no"
    zero: Literal["positive", "none"] = "positive"


@dataclass(frozen=True)
class MaskedTile:
    """base + scale * combination of the kept entries; see ``masked_consensus``.

    are_vectors: per expert whether its row is a task vector. Columns: floats[0] is the scale, then per expert weight,
    gain, int8 scale, low, high, top_low, top_high, spread; ints[0] is the hash of ties, then per expert the hash
    of its draws, cut, top_cut. scaled, gained: whether an int8 scale or a gain differs from 1, or need not be read.
    """

    is_sum: ClassVar[bool] = False

    are_vectors: tuple[bool, ...]
    keep: Keep
    vote: Vote
    unbiased: bool = False
    scaled: bool = True
    gained: bool = True

    FLOATS = 8
    INTS = 3

    def __call__(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor, ints_CB: Tensor) -> Tensor:
        """Return the merged blocks."""
        return base.float() + floats_CB[0, :, None] * self.combination(base, rows, floats_CB, ints_CB)

    def combination(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor, ints_CB: Tensor) -> Tensor:
        """Return the combination of the kept entries times their gain."""
        floats, ints = floats_CB[:, :, None].unbind(0), ints_CB[:, :, None].unbind(0)
        vectors = []
        for k, is_vector in enumerate(self.are_vectors):
            held = rows[k].float()
            if self.scaled:
                held = held * floats[3 + k * self.FLOATS]
            vectors.append(held if is_vector else held - base.float())
        variances = variance(vectors) if self.keep == "variance" else None
        entries = [
            self._entries(k, vector, vector if variances is None else variances, rows, floats, ints)
            for k, vector in enumerate(vectors)
        ]
        return _combined(entries, floats_CB[1 :: self.FLOATS, :, None].unbind(0), self.vote)

    def _entries(
        self,
        k: int,
        vector: Tensor,
        size: Tensor,
        rows: Sequence[Tensor],
        floats: Sequence[Tensor],
        ints: Sequence[Tensor],
    ) -> Tensor:
        """Return expert k's kept entries; ``size`` is what the thresholds are compared with."""
        gain, _, low, high, top_low, top_high, spread = floats[2 + k * self.FLOATS :][:7]
        key, cut, top_cut = ints[1 + k * self.INTS :][: self.INTS]
        column = torch.arange(vector.shape[1], dtype=torch.int32, device=vector.device)[None]
        if self.gained:
            vector = vector * gain
        if self.keep == "uniform":
            kept = hash32(column ^ key) <= cut
        elif self.keep == "rank":
            # In float32: a draw's 24 leading bits against the probability of this entry's rank.
            probability = cut.view(torch.float32) + spread * rows[len(self.are_vectors) + k].float()
            kept = ((hash32(column ^ key) >> 8) + 2**23).float() * 2.0**-24 < probability
            if self.unbiased:
                vector = vector / probability
        else:
            tie = column * GOLDEN + ints[0]
            kept = size.abs() >= torch.where(tie <= cut, low, high)
            if self.keep == "window":
                kept = kept & (size.abs() < torch.where(tie <= top_cut, top_low, top_high))
        return torch.where(kept, vector, 0.0)


@dataclass(frozen=True)
class KeptTile:
    """The combination of ``masked`` by itself, without the base and the scale."""

    is_sum: ClassVar[bool] = False

    masked: MaskedTile

    def __call__(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor, ints_CB: Tensor) -> Tensor:
        """Return the blocks."""
        return self.masked.combination(base, rows, floats_CB, ints_CB)


def _combined(entries: Sequence[Tensor], weights: Sequence[Tensor], vote: Vote) -> Tensor:
    """Return the combination of the experts' kept entries that ``vote`` describes."""
    terms = [entry * weight for entry, weight in zip(entries, weights, strict=True)]
    sides = entries if vote.elect == "unweighted" else terms
    votes = [torch.sign(side) for side in sides] if vote.elect == "count" else sides
    total = sum(votes[1:], votes[0])
    if vote.elect == "no":
        if vote.divide == "no":
            return total
        agreeing = [term != 0 for term in terms]
    else:
        elected = torch.where(total >= 0, 1.0, -1.0) if vote.zero == "positive" else torch.sign(total)
        agreeing = [side * elected > 0 for side in sides]
        agreed = [torch.where(agrees, term, 0.0) for agrees, term in zip(agreeing, terms, strict=True)]
        total = sum(agreed[1:], agreed[0])
    if vote.divide == "no":
        return total
    shares = weights if vote.divide == "weights" else [torch.ones_like(weight) for weight in weights]
    divisors = [torch.where(agrees, share, 0.0) for agrees, share in zip(agreeing, shares, strict=True)]
    divisor = sum(divisors[1:], divisors[0])
    return total / torch.where(divisor == 0, 1.0, divisor)


GOLDEN = -1640531535  # 2^32 over the golden ratio: a sequence that fills the interval evenly
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)  # multipliers of a 32-bit mixer without known bias (Wellons 2018, "lowbias32")


def hash32(number: Tensor) -> Tensor:
    """Return well mixed int32 of int32; every result is hit once."""
    number = (number ^ ((number >> 16) & 0xFFFF)) * _MIX[0]
    number = (number ^ ((number >> 15) & 0x1FFFF)) * _MIX[1]
    return number ^ ((number >> 16) & 0xFFFF)


def variance(vectors: Sequence[Tensor]) -> Tensor:
    """Return the population variance of each entry across vectors."""
    # Times a factor: by a number, torch divides otherwise on a GPU than Triton, and thresholds must be met exactly.
    share = 1 / len(vectors)
    mean = sum(vectors[1:], vectors[0]) * share
    squares = [(vector - mean) ** 2 for vector in vectors]
    return sum(squares[1:], squares[0]) * share
