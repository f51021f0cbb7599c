"""Task arithmetic with several coefficients a tensor: the tensors that matter most are cut into contiguous chunks."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.linear import InParts
from evomerge.operators.operator import Values
from evomerge.records import Options


class ChunkedOptions(Options):
    """chunks: of a tensor, at most; budget: chunks a tensor, on average, before that limit (the paper: 0.9 to 1.2).

    kappa: the power of a tensor's importance, 0 cuts all alike; start: where coefficients start unless the space says
    otherwise, and stay where a tensor has no chunk.
    """

    chunks: int = Field(default=4, ge=2)
    budget: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    kappa: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    start: float = Field(default=0.3, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """What is weighed, chunk by chunk, and the number of chunks of each tensor (S,); one without is in the first."""

    directions: Sources
    num_chunks_S: Tensor


class Chunked(InParts):
    """Task arithmetic with several coefficients for the tensors that matter most, cut into contiguous chunks.

        theta = base + sum_k sum_p c_kp (m_p * tau_k)
        m_p = 1 in the p-th chunk of the flattened tensor, else 0

    A tensor's importance is I_s = sum_k sum |tau_ks|, over its entries, and its number of chunks, of S tensors,
    floor(budget * S * I_s^kappa / sum_j I_j^kappa), at most ``chunks``. A tensor of fewer uses the first coefficients.
    Its others move nothing: their slope is 0, so that a descent leaves them (but for weight decay), yet they are still
    numbers of the space, on which searches by scores alone spend trials. Where a tensor has no chunk, no number moves
    anything. ``space.groups: tensor`` gives each tensor its own; wider groups share the p-th coefficient among the p-th
    chunks of their tensors. Nothing is copied: a merge is one pass over base and experts.
    When to use: with ``expert_merging`` or another descent and ``groups: tensor``, where a few large tensors hold most
    of what experts learned; it needs no more memory than ``task_arithmetic``. Not with searches by scores alone.
    Reference: Expert Merging++, 2025, arxiv.org/abs/2509.25712.
    Departures: importance counts all coefficients as equal, where the paper weighs task vectors by those of a training
    before; chunks begin at multiples of 1,024 entries, so that a tensor has no more than it has of these; and their
    number has a limit.
    """

    name: ClassVar[str] = "chunked"

    options_type: ClassVar[type[Options]] = ChunkedOptions

    def __init__(self, options: ChunkedOptions | None = None) -> None:
        self.options = options or ChunkedOptions()
        super().__init__(self.options.chunks, "chunk", default=self.options.start)

    def prepare(self, sources: Sources, values: Values, earlier: Chunks | None) -> Chunks:  # noqa: ARG002
        """Cut the tensors: each chunk is all experts, with a factor of 0 on the blocks of the other chunks."""
        layout = sources.layout
        num_blocks_S = layout.block_segment.bincount(minlength=sources.num_tensors)
        num_chunks_S = self._num_chunks(sources.absolute_sums(1).sum(0)).minimum(num_blocks_S)
        place_B = torch.arange(len(layout.block_segment)) - layout.first_block[layout.block_segment]
        chunk_B = place_B * num_chunks_S[layout.block_segment] // num_blocks_S[layout.block_segment]
        experts = []
        for number in range(len(self.parameters)):
            mine_B = (chunk_B == number).float().to(sources.device)
            for expert in sources.experts:
                assert isinstance(expert, Dense)
                scales_B = mine_B if expert.scales_B is None else mine_B * expert.scales_B
                experts.append(replace(expert, scales_B=scales_B))
        return Chunks(replace(sources, experts=tuple(experts)), num_chunks_S)

    def directions(self, sources: Sources, state: Chunks) -> Sources:  # noqa: ARG002
        """The experts, chunk by chunk."""
        return state.directions

    def weights(self, values: Values, state: Chunks) -> Tensor:
        """The base once, then the coefficients; where a tensor has no chunk, the start."""
        is_cut_S = state.num_chunks_S > 0
        kept = {spec.name: torch.where(is_cut_S, values[spec.name], self.options.start) for spec in self.parameters}
        return super().weights(kept, state)

    def _num_chunks(self, sums_S: Tensor) -> Tensor:
        """Return the number of chunks that the options give tensors of these sums of magnitudes, (S,) int64."""
        powers_S = (sums_S / sums_S.sum()).nan_to_num() ** self.options.kappa  # without any magnitude there is no share
        shares_S = (powers_S / powers_S.sum()).nan_to_num()
        whole_S = (self.options.budget * len(sums_S) * shares_S + 1e-9).floor()  # equal shares are not rounded down
        return whole_S.clamp(max=self.options.chunks).long()
