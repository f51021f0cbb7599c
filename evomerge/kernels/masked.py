"""The kernel of the rules that keep some entries of each task vector and may let them vote on a sign.

Shape letters: K experts, S tensors, P padded elements, B blocks (P = 1024 B), C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evomerge.kernels.launch import launch
from evomerge.kernels.sources import Dense, Sources
from evomerge.kernels.tiles import Keep, KeptTile, MaskedTile, Vote, hash32


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


def kept_entries(sources: Sources, trims: Trims, vote: Vote) -> tuple[Dense, ...]:
    """Return what each task vector adds to the combination at a weight of 1, rounded to the base's dtype.

    The combination must be linear in the weights: nothing is elected or divided by them.
    """
    assert vote.elect in ("no", "unweighted")
    assert vote.divide != "weights"
    tile, rows = _masked_tile(sources, trims, vote)
    floats_CB, ints_CB = _masked_columns(
        sources, trims.gain_KS.new_zeros(sources.num_experts + 1, sources.num_tensors), trims
    )
    kept = []
    for k in range(sources.num_experts):
        held = (
            [k] if vote.elect == "no" else list(range(sources.num_experts))
        )  # without a vote, the others are not read
        one = KeptTile(replace(tile, are_vectors=tuple(tile.are_vectors[other] for other in held)))
        weighed_CB = floats_CB.clone()
        weighed_CB[1 + k * tile.FLOATS] = 1.0
        columns = tuple(
            numbers[[0, *(1 + other * width + column for other in held for column in range(width))]]
            for numbers, width in ((weighed_CB, tile.FLOATS), (ints_CB, tile.INTS))
        )
        read = [rows[row] for row in range(len(rows)) if row % sources.num_experts in held]
        out_P = torch.empty_like(sources.base_P)
        launch(one, out_P, sources.layout.runs(None), sources.base_P, read, columns)
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
