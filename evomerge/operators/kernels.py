"""The kernels: whole-model merges over flat buffers, in place, with float32 accumulation and a single rounding.

``lincomb`` serves every rule that is linear in effective coefficients, ``masked_consensus`` the rules that keep some
entries of each task vector and may let them vote on a sign. Each is one tile expression (see ``launch.py``).

Shape letters: K experts, S tensors, P padded elements, B blocks (P = 1024 B), E elements of a block, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evomerge.operators.launch import launch
from evomerge.operators.layout import BLOCK
from evomerge.operators.sources import Dense, LowRank, Sources

CHUNK = 2**18  # elements of a float32 temporary that stays in the cache


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


def lincomb(out_P: Tensor, sources: Sources, weights_KS: Tensor, changed: Sequence[int] | None = None) -> None:
    """Write ``w[0] * base + sum_k w[k] * tau_k`` to ``out_P``; of the ``changed`` tensors only, if given.

    Shapes: weights_KS (K+1, S), float64: row 0 scales the base, the others the task vectors. Task vectors of
    checkpoints are never formed: the base is read once with the coefficient ``w[0] - sum_k w[k]``, so that all-zero
    weights give the base and one expert at 1 gives that expert, bit for bit (but for the sign of a zero). Adapters
    stay factored: their tensors are summed in float32, all ranks in one product, and rounded once.
    """
    layout = sources.layout
    factored: set[int] = set()
    for expert in sources.experts:
        factored |= expert.factors.keys() if isinstance(expert, LowRank) else set()
    flat = changed
    if factored:
        asked = range(sources.num_tensors) if changed is None else changed
        flat = [s for s in asked if s not in factored]
        factored &= set(asked)
    rows, floats_CB = _linear_columns(sources, weights_KS)
    launch(LincombTile(), out_P, layout.runs(flat), sources.base_P, rows, [floats_CB])
    for s in sorted(factored):
        _lincomb_factored(out_P, sources, weights_KS, (rows, floats_CB), s)


def _linear_columns(sources: Sources, weights_KS: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the dense experts' buffers and the factors (1 + rows, B) of base and rows."""
    dense = [(k, expert) for k, expert in enumerate(sources.experts, start=1) if isinstance(expert, Dense)]
    checkpoints = [k for k, expert in dense if not expert.is_task_vector]
    columns_CS = torch.cat([weights_KS[:1] - weights_KS[checkpoints].sum(0), weights_KS[[k for k, _ in dense]]])
    floats_CB = sources.spread(columns_CS.float())
    for c, (_, expert) in enumerate(dense, start=1):
        if expert.scales_B is not None:
            floats_CB[c] *= expert.scales_B
    return [expert.buffer_P for _, expert in dense], floats_CB


def _lincomb_factored(
    out_P: Tensor, sources: Sources, weights_KS: Tensor, dense: tuple[list[Tensor], Tensor], s: int
) -> None:
    rows, floats_CB = dense
    [run] = sources.layout.runs([s])
    segment, blocks = sources.layout.segments[s], slice(run.start * BLOCK, run.stop * BLOCK)
    total_P = torch.empty(blocks.stop - blocks.start, device=out_P.device)
    launch(
        LincombTile(), total_P, [slice(0, run.stop - run.start)], sources.base_P[blocks],
        [row[blocks] for row in rows], [floats_CB[:, run]],
    )  # fmt: skip
    factors = [
        (float(weights_KS[k, s]) * expert.factors[s][0], expert.factors[s][1])
        for k, expert in enumerate(sources.experts, start=1)
        if isinstance(expert, LowRank) and s in expert.factors
    ]
    total_E = total_P[: segment.stop - segment.start]
    for num_rows in sorted({len(b) for b, _ in factors}):  # a whole task vector among them is one column
        left = torch.cat([b for b, _ in factors if len(b) == num_rows], dim=1)
        right = torch.cat([a for b, a in factors if len(b) == num_rows])
        total_E.view(num_rows, -1).addmm_(left, right)
    out_P[blocks] = total_P.to(out_P.dtype)


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


@dataclass(frozen=True, slots=True, eq=False)
class Trims:
    """Which entries of a task vector are kept, by numbers an expert and tensor (K, S), float64.

    keep says how they are read; ``cut`` is a probability:
      magnitude  |tau| >= high, or |tau| >= low with probability cut (entries that tie, or lie between two of a
                 table's entries, are taken by a hash of their place)
      window     as magnitude, and not (|tau| >= top_high, or >= top_low with probability top_cut)
      uniform    u < cut, u a hash of (seed, expert, tensor, place): nothing stored, the same for all candidates
      rank       u < cut + spread * rank, ranks_KP the entries' ranks within their rows, int16 of [0, 32767]
      variance   as magnitude, of the task vectors' variance across experts; every expert has the same numbers
    gain: factor on the kept entries before they are weighed. unbiased: of ``rank``, each kept entry is divided by its
    own probability of being kept. seed: of the hashes.
    """

    keep: Keep
    gain_KS: Tensor
    low_KS: Tensor | None = None
    high_KS: Tensor | None = None
    cut_KS: Tensor | None = None
    top_low_KS: Tensor | None = None
    top_high_KS: Tensor | None = None
    top_cut_KS: Tensor | None = None
    spread: float = 0.0
    ranks_KP: Tensor | None = None
    unbiased: bool = False
    seed: int = 0


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
        weights = floats_CB[1 :: self.FLOATS, :, None].unbind(0)
        total = _combined(self.entries(base, rows, floats_CB, ints_CB), weights, self.vote)
        return base.float() + floats_CB[0, :, None] * total

    def entries(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor, ints_CB: Tensor) -> list[Tensor]:
        """Return each expert's kept entries times their gain, zero elsewhere."""
        floats, ints = floats_CB[:, :, None].unbind(0), ints_CB[:, :, None].unbind(0)
        vectors = []
        for k, is_vector in enumerate(self.are_vectors):
            held = rows[k].float()
            if self.scaled:
                held = held * floats[3 + k * self.FLOATS]
            vectors.append(held if is_vector else held - base.float())
        variances = variance(vectors) if self.keep == "variance" else None
        return [
            self._entries(k, vector, vector if variances is None else variances, rows, floats, ints)
            for k, vector in enumerate(vectors)
        ]

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
    """The kept entries of the one expert of ``masked``, times their gain."""

    is_sum: ClassVar[bool] = False

    masked: MaskedTile

    def __call__(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor, ints_CB: Tensor) -> Tensor:
        """Return the blocks."""
        return self.masked.entries(base, rows, floats_CB, ints_CB)[0]


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


def masked_consensus(
    out_P: Tensor,
    sources: Sources,
    weights_KS: Tensor,
    trims: Trims,
    vote: Vote,
    changed: Sequence[int] | None = None,
) -> None:
    """Write base plus the combination of the kept entries of the task vectors to ``out_P``.

    Shapes: weights_KS (K+1, S), float64: row 0 scales the combination, the others weigh the task vectors.
    All experts must be ``Dense``.
    """
    tile, rows = _masked_tile(sources, trims, vote)
    columns = _masked_columns(sources, weights_KS, trims)
    launch(tile, out_P, sources.layout.runs(changed), sources.base_P, rows, columns)


def kept_entries(sources: Sources, trims: Trims) -> tuple[Dense, ...]:
    """Return what is kept of each task vector, times its gain, rounded to the base's dtype."""
    tile, rows = _masked_tile(sources, trims, Vote())
    ones_KS = trims.gain_KS.new_ones(sources.num_experts + 1, sources.num_tensors)
    floats_CB, ints_CB = _masked_columns(sources, ones_KS, trims)
    kept = []
    for k, is_vector in enumerate(tile.are_vectors):
        columns = (
            floats_CB[[0, *range(1 + k * tile.FLOATS, 1 + (k + 1) * tile.FLOATS)]],
            ints_CB[[0, *range(1 + k * tile.INTS, 1 + (k + 1) * tile.INTS)]],
        )
        out_P = torch.empty_like(sources.base_P)
        one = KeptTile(replace(tile, are_vectors=(is_vector,)))
        launch(one, out_P, sources.layout.runs(None), sources.base_P, rows[k :: sources.num_experts], columns)
        kept.append(Dense(out_P, is_task_vector=True))
    return tuple(kept)


def _masked_tile(sources: Sources, trims: Trims, vote: Vote) -> tuple[MaskedTile, list[Tensor]]:
    """Return the tile and the rows it reads."""
    experts = [expert for expert in sources.experts if isinstance(expert, Dense)]
    assert len(experts) == sources.num_experts
    rows = [expert.buffer_P for expert in experts]
    if trims.ranks_KP is not None:
        rows += trims.ranks_KP.unbind(0)
    tile = MaskedTile(
        tuple(expert.is_task_vector for expert in experts),
        trims.keep,
        vote,
        trims.unbiased,
        scaled=any(expert.scales_B is not None for expert in experts),
        gained=bool((trims.gain_KS != 1).any()),
    )
    return tile, rows


def _masked_columns(sources: Sources, weights_KS: Tensor, trims: Trims) -> tuple[Tensor, Tensor]:
    """Return the tile's columns: floats (1 + 8 K, B) and ints (1 + 3 K, B)."""
    zero_KS = torch.zeros_like(weights_KS[1:])
    given = (trims.low_KS, trims.high_KS, trims.top_low_KS, trims.top_high_KS)
    spread_KS = torch.full_like(zero_KS, trims.spread / 32767)
    numbers = [
        weights_KS[1:], trims.gain_KS, zero_KS + 1, *(zero_KS if one is None else one for one in given), spread_KS
    ]  # fmt: skip
    floats_CS = torch.cat([weights_KS[:1], torch.stack(numbers, dim=1).flatten(0, 1)]).float()
    cuts = [_cut(zero_KS if one is None else one, trims.keep) for one in (trims.cut_KS, trims.top_cut_KS)]
    floats_CB = sources.spread(floats_CS)
    for k, expert in enumerate(sources.experts):
        if isinstance(expert, Dense) and expert.scales_B is not None:
            floats_CB[3 + k * MaskedTile.FLOATS] = expert.scales_B
    no_keys_K1S = torch.zeros(len(cuts[0]), 1, cuts[0].shape[1], dtype=torch.int32)
    ints_CS = torch.cat([no_keys_K1S, torch.stack(cuts, dim=1)], dim=1).flatten(0, 1)
    ints_CB = sources.spread(torch.cat([torch.zeros_like(ints_CS[:1]), ints_CS]))
    keys_KB = block_keys(sources, trims.seed)
    ints_CB[0], ints_CB[1 :: MaskedTile.INTS] = keys_KB[-1], keys_KB[:-1]
    return floats_CB, ints_CB


def _cut(probability_KS: Tensor, keep: Keep) -> Tensor:
    """Return the int32 that a uniform int32 does not exceed with that probability (the float's bits for ``rank``)."""
    if keep == "rank":
        return probability_KS.float().view(torch.int32)
    return (probability_KS * 2.0**32 - 2.0**31 - 1).round().clamp(-(2.0**31), 2.0**31 - 1).to(torch.int32)


GOLDEN = -1640531535  # 2^32 over the golden ratio: a sequence that fills the interval evenly
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)  # multipliers of a 32-bit mixer without known bias (Wellons 2018, "lowbias32")


def hash32(number: Tensor) -> Tensor:
    """Return well mixed int32 of int32; every result is hit once."""
    number = (number ^ ((number >> 16) & 0xFFFF)) * _MIX[0]
    number = (number ^ ((number >> 15) & 0x1FFFF)) * _MIX[1]
    return number ^ ((number >> 16) & 0xFFFF)


def block_keys(sources: Sources, seed: int) -> Tensor:
    """Return a hash of (seed, expert or K for ties, tensor, block within the tensor), (K + 1, B) int32.

    An entry's draw is the hash of its column and its block's key: equal for all candidates, wherever tensors lie.
    """
    held = _keys.setdefault(sources, {})
    if seed not in held:
        held[seed] = _block_keys(sources, seed)
    return held[seed]


_keys: WeakKeyDictionary[Sources, dict[int, Tensor]] = WeakKeyDictionary()


def _block_keys(sources: Sources, seed: int) -> Tensor:
    layout, device = sources.layout, sources.device
    names = torch.tensor([name_hash(tensor.name) for tensor in layout.tensors], dtype=torch.int32)
    place = torch.arange(len(layout.block_segment)) - layout.first_block[layout.block_segment]
    blocks_B = hash32(hash32(names[layout.block_segment] + seed) + place.to(torch.int32))
    experts_K = torch.arange(sources.num_experts + 1, dtype=torch.int32)
    return hash32(blocks_B[None] + hash32(experts_K + 1)[:, None]).to(device)


def name_hash(name: str) -> int:
    """FNV-1a of the name, as an int32: the same in every process."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def variance(vectors: Sequence[Tensor]) -> Tensor:
    """Return the population variance of each entry across vectors."""
    # Times a factor: by a number, torch divides otherwise on a GPU than Triton, and thresholds must be met exactly.
    share = 1 / len(vectors)
    mean = sum(vectors[1:], vectors[0]) * share
    squares = [(vector - mean) ** 2 for vector in vectors]
    return sum(squares[1:], squares[0]) * share


def task_vector_products(gradient_E: Tensor, sources: Sources, s: int) -> Tensor:
    """Return <gradient, base> and <gradient, tau_k> of tensor s, shape (K+1,), float64.

    These are the derivatives of a loss in the rows of ``lincomb``'s weights: dL/dw[k] = <dL/dtheta, tau_k>.
    """
    segment = sources.layout.segments[s]
    products = torch.zeros(sources.num_experts + 1, dtype=torch.float64, device=gradient_E.device)
    for start in range(0, len(gradient_E), CHUNK):
        here = slice(segment.start + start, min(segment.start + start + CHUNK, segment.stop))
        gradient = gradient_E[start : start + CHUNK].float()
        base = sources.base_P[here].float()
        products[0] += gradient @ base
        for k, expert in enumerate(sources.experts, start=1):
            if isinstance(expert, Dense) and expert.scales_B is None:
                held = expert.buffer_P[here].float()
                products[k] += gradient @ (held if expert.is_task_vector else held - base)
    for k, expert in enumerate(sources.experts, start=1):
        if isinstance(expert, LowRank) and s in expert.factors:
            b, a = expert.factors[s]
            products[k] = ((gradient_E.float().view(b.shape[0], -1) @ a.T) * b).double().sum()
        elif isinstance(expert, Dense) and expert.scales_B is not None:
            products[k] = (gradient_E.float() @ sources.task_vector(k - 1, s).view(-1)).double()
    return products
