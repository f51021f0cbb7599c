"""Consensus Task Arithmetic: of the sum of the task vectors only what is important to several tasks (TALL masks)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from evomerge.errors import InputError
from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.linear import Lincomb
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


@dataclass(frozen=True, slots=True, eq=False)
class ConsensusState:
    """The masked sum of the task vectors as the only expert, and the thresholds (K, S) that made it."""

    directions: Sources
    thresholds_KS: Tensor


class ConsensusOptions(Options):
    """k: of how many experts' masks an entry must be part; 1 drops what no expert needs, 2 also what only one does."""

    k: int = Field(default=2, ge=1)


class Consensus(Lincomb):
    """Consensus Task Arithmetic: of the sum of the task vectors only what is important to several tasks (TALL masks).

        theta = base + scale * 1[sum_k m_k >= k_min] tau
        m_k = 1[|tau_k| > threshold_k |tau - tau_k|]
        tau = sum_k tau_k, k_min = the option k

    The mask m_k holds what a task needs of the sum: where its own task vector is large against what the others add. In
    the scale the merge is linear; the masked sum is held in the model's dtype, one model's size beside base and
    experts, and remade when a threshold changes. (The official code can also mask a TIES merge; not here.)
    When to use: many experts, of whose sum what only one needs may go; one number, the scale, is cheap and has a
    gradient. Not with two experts (``k: 2`` keeps only what both need), and not to steer between abilities.
    Reference: Wang et al. 2024, arxiv.org/abs/2405.07813; the thresholds are its lambda, tuned by task.
    """

    name: ClassVar[str] = "consensus"
    reads_factors: ClassVar[bool] = False

    options_type: ClassVar[type[Options]] = ConsensusOptions

    def __init__(self, options: ConsensusOptions | None = None) -> None:
        self.options = options or ConsensusOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="scale", meaning="factor on the masked sum", default=0.3, low=0.1, high=1.0, per_expert=False
            ),
            ParameterSpec(
                name="threshold",
                meaning="how large an entry of the task vector must be against what the other experts add to it",
                default=0.4,
                low=0.2,
                high=0.6,
                minimum=0.0,
                structural=True,
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: ConsensusState | None) -> ConsensusState:
        """Mask the sum, in tensors whose thresholds are others than before. Raises: InputError if k > K."""
        k, thresholds_KS = self.options.k, values["threshold"]
        if k > sources.num_experts:
            raise InputError(
                f"consensus: k: expected at most the number of experts, {sources.num_experts}, found {k}; no entry is "
                "part of so many masks, and every merge would be the base"
            )
        if earlier:
            [sum_] = earlier.directions.experts
            assert isinstance(sum_, Dense)
            buffer_P = sum_.buffer_P
        else:
            buffer_P = torch.zeros_like(sources.base_P)
        for s in range(sources.num_tensors):
            if earlier and torch.equal(earlier.thresholds_KS[:, s], thresholds_KS[:, s]):
                continue
            thresholds_K11 = thresholds_KS[:, s, None, None].float().to(sources.device)
            for rows, place in sources.chunks(s):
                vectors = sources.task_vectors(s, rows)
                total = vectors.sum(0)
                needed = (vectors.abs() > thresholds_K11 * (total - vectors).abs()).sum(0) >= k
                buffer_P[place] = torch.where(needed, total, 0.0).view(-1).to(buffer_P.dtype)
        only = (Dense(buffer_P, is_task_vector=True),)
        return ConsensusState(replace(sources, experts=only), thresholds_KS.clone())

    def directions(self, sources: Sources, state: ConsensusState) -> Sources:  # noqa: ARG002
        """The masked sum."""
        return state.directions

    def weights(self, values: Values, state: ConsensusState) -> Tensor:  # noqa: ARG002
        """Two rows: the base once, the masked sum by its scale."""
        return torch.cat([torch.ones_like(values["scale"]), values["scale"]])
