"""How many of a task vector's entries a trim keeps, and their sum: counted once, answered for any density.

Shape letters: K experts, S tensors, B blocks, E elements of a piece, T entries of a table.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Sources
from evomerge.kernels.tiles import hash32
from evomerge.records import Floats, Items

ALL_ENTRIES = 2**14  # so many elements are held whole; of more, counts between this many quantiles / 4
QUANTILES = 2**12
DROPPED_BITS = 12  # of a float32: magnitudes are counted in steps of 2^-11 of themselves


@dataclass(frozen=True, slots=True, eq=False)
class MagnitudeTable:
    """Magnitudes in descending order, (T,), how many entries reach each, and their sum.

    Up to 16,384 entries are held whole, and every density is exact but for entries that tie. Of more the magnitudes
    are counted in steps of 2^-11 of themselves, without sorting, and some 4,096 of the steps' ends are held, each with
    its exact count. Entries between two ends, and entries that tie, are taken with the probability that gives the
    asked number on average: off by some sqrt(N) / 2 for N such entries, which without ties are E / 4096 (80 of 100
    million). The sums are right to 2^-12.
    """

    values_T: Floats
    counts_T: Floats
    masses_T: Floats
    num_elements: int

    @classmethod
    def of(cls, magnitudes_E: Tensor) -> "MagnitudeTable":
        """Count the magnitudes, float32 and none negative."""
        return cls.over([magnitudes_E], magnitudes_E.numel())

    @classmethod
    def over(cls, pieces: Iterable[Tensor], num_elements: int) -> "MagnitudeTable":
        """Count the magnitudes of all pieces together, which hold so many elements and are read once."""
        if num_elements <= ALL_ENTRIES:
            ascending = np.sort(np.concatenate([piece.cpu().numpy().reshape(-1) for piece in pieces]))
            values, first_T = np.unique(ascending, return_index=True)
            masses_T = np.add.reduceat(ascending, first_T, dtype=np.float64)[::-1].cumsum()
            counts_T = (num_elements - first_T)[::-1].astype(np.float64)
            return cls(values[::-1].astype(np.float64), counts_T, masses_T, num_elements)
        histogram = _histogram(pieces)
        codes = np.flatnonzero(histogram)[::-1]
        num = histogram[codes].astype(np.float64)
        ends, upper_ends = (((codes + step) << DROPPED_BITS).astype(np.int32).view(np.float32) for step in (0, 1))
        counts, masses = num.cumsum(), (num * (ends.astype(np.float64) + upper_ends) / 2).cumsum()
        # The last end before each quantile; and the step that passes several, so that a magnitude that very many
        # entries share is told from those above and below it.
        passed = np.diff((counts * (QUANTILES / num_elements)).astype(np.int64))
        held = np.append(passed > 0, True) | np.append(False, passed > 1)
        return cls(ends[held].astype(np.float64), counts[held], masses[held], num_elements)

    def threshold(self, num_kept: float) -> tuple[float, float, float]:
        """Return (low, high, cut): keep what reaches high, and of what reaches low that share."""
        j = int(np.searchsorted(self.counts_T, num_kept, side="right"))  # entries up to j - 1 are kept whole
        high = self.values_T[j - 1] if j else np.inf
        if j == len(self.values_T) or (j and self.counts_T[j - 1] == num_kept):
            return high, high, 0.0
        before = self.counts_T[j - 1] if j else 0.0
        return self.values_T[j], high, (num_kept - before) / (self.counts_T[j] - before)

    def mass(self, num_kept: float) -> float:
        """Return the sum of the largest magnitudes, so many of them."""
        return float(np.interp(num_kept, np.append(0.0, self.counts_T), np.append(0.0, self.masses_T)))


def _histogram(pieces: Iterable[Tensor]) -> Items:
    """Count the magnitudes by their leading bits: a positive float's bits, read as an integer, sort as the float."""
    counts: Tensor | None = None
    for piece in pieces:
        codes_E = piece.reshape(-1).view(torch.int32) >> DROPPED_BITS
        if counts is None:
            counts = torch.zeros(2 ** (31 - DROPPED_BITS), dtype=torch.int64, device=piece.device)
        counts.index_add_(0, codes_E, counts.new_ones(()).expand(len(codes_E)))
    assert counts is not None
    return counts.cpu().numpy()


Tables = list[list[MagnitudeTable]]
"""Of every expert, of every tensor."""


def magnitude_tables(sources: Sources, scope: Literal["tensor", "model"] = "tensor") -> Tables:
    """Return a table of every expert and tensor; of the whole model, all tensors of an expert have the same."""
    experts, tensors = range(sources.num_experts), range(sources.num_tensors)
    num_S = [tensor.num_elements for tensor in sources.layout.tensors]
    if scope == "tensor":
        return [[MagnitudeTable.over(_magnitudes(sources, k, s), num_S[s]) for s in tensors] for k in experts]
    tables = []
    for k in experts:
        pieces = chain.from_iterable(_magnitudes(sources, k, s) for s in tensors)
        tables.append([MagnitudeTable.over(pieces, sum(num_S))] * len(num_S))
    return tables


def _magnitudes(sources: Sources, k: int, s: int) -> Iterator[Tensor]:
    for rows, _ in sources.chunks(s):
        yield sources.task_vector(k, s, rows).abs_()


def thresholds(tables: Tables, num_kept_KS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return low, high and cut (K, S) that keep so many entries of each task vector."""
    numbers = [
        [table.threshold(count) for table, count in zip(row, counts, strict=True)]
        for row, counts in zip(tables, num_kept_KS.tolist(), strict=True)
    ]
    low_KS, high_KS, cut_KS = torch.tensor(numbers, dtype=torch.float64).unbind(-1)
    return low_KS, high_KS, cut_KS


def num_kept(densities_KS: Tensor, sizes_S: Tensor) -> Tensor:
    """Return int(density * E), at least 1, of every task vector."""
    return (densities_KS * sizes_S).floor().clamp(min=1.0).minimum(sizes_S.expand_as(densities_KS))


def sizes(sources: Sources, scope: Literal["tensor", "model"] = "tensor") -> Tensor:
    """Return the numbers of elements that densities are fractions of, (S,), float64."""
    sizes_S = torch.tensor([tensor.num_elements for tensor in sources.layout.tensors], dtype=torch.float64)
    return sizes_S if scope == "tensor" else sizes_S.sum().expand_as(sizes_S)


def l1_gain(tables: Tables, kept_KS: Tensor, dropped_KS: Tensor | None = None) -> Tensor:
    """Return the factor (K, S) that gives each trimmed task vector the sum of magnitudes of the whole one.

    Kept are so many of the largest entries, but for the very largest, of which so many are dropped.
    """
    dropped_KS = torch.zeros_like(kept_KS) if dropped_KS is None else dropped_KS
    rows = []
    for row, kept, dropped in zip(tables, kept_KS.tolist(), dropped_KS.tolist(), strict=True):
        parts = [
            table.mass(below) - (table.mass(above) if above else 0.0)
            for table, below, above in zip(row, kept, dropped, strict=True)
        ]
        rows.append([_gain(float(table.masses_T[-1]), part) for table, part in zip(row, parts, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def _gain(whole: float, part: float) -> float:
    # The bound is mergekit's: what is left of nearly nothing is left as it is.
    return whole / part if min(whole, part) > 1e-7 else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class DrawnMass:
    """What the magnitudes of the entries that are drawn sum to, for any limit that a draw must stay below.

    Up to 16,384 entries are held whole, in the order of their draws (T,). Of more the sums are held at 4,097 limits
    and interpolated: off by some sqrt(E / 4096) / 2 of E entries.
    """

    draws_T: Floats
    masses_T: Floats
    whole: bool

    @classmethod
    def of(cls, pieces: Iterable[tuple[Tensor, Tensor]], num_elements: int, low: float = 0.0) -> "DrawnMass":
        """Sum the magnitudes by their draws, of [low, 1); pieces holds (draws (E,), magnitudes (E,))."""
        if num_elements <= ALL_ENTRIES:
            draws, magnitudes = (torch.cat(held).cpu().double().numpy() for held in zip(*pieces, strict=True))
            order = draws.argsort()
            return cls(draws[order], magnitudes[order].cumsum(), whole=True)
        sums_T = np.zeros(QUANTILES)
        for draws_E, magnitudes_E in pieces:
            places_E = ((draws_E - low) * (QUANTILES / (1 - low))).long().clamp(0, QUANTILES - 1)
            sums_T += torch.bincount(places_E, magnitudes_E.double(), minlength=QUANTILES).cpu().numpy()
        return cls(np.linspace(low, 1.0, QUANTILES + 1), np.append(0.0, sums_T).cumsum(), whole=False)

    def gain(self, limit: float) -> float:
        """Return the factor that gives the entries with a draw below ``limit`` the sum of all."""
        if self.whole:
            place = int(np.searchsorted(self.draws_T, limit, side="left"))
            part = self.masses_T[place - 1] if place else 0.0
        else:
            part = np.interp(limit, self.draws_T, self.masses_T)
        return _gain(float(self.masses_T[-1]), float(part))


def uniform_draws(keys_B: Tensor, place: slice) -> Tensor:
    """Return the kernel's draws of the elements at ``place`` of the buffers, (E,), float64 of [0, 1).

    keys_B are one expert's of ``block_keys``.
    """
    at_E = torch.arange(place.start, place.stop, device=keys_B.device)
    return (hash32((at_E % BLOCK).int() ^ keys_B[at_E // BLOCK]).double() + 2.0**31) * 2.0**-32
