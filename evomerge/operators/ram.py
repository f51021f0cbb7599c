"""RAM: what one expert alone changed is kept whole, what several changed is averaged over those.

Shape letters: K experts, S tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomerge.kernels.launch import launch
from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


@dataclass(frozen=True)
class RamTile:
    """base + the mean of the changed entries, times the expert's gain where only one changed.

    are_vectors: per expert whether its row is a task vector. Columns: epsilon, then per expert its gain, int8 scale.
    """

    is_sum: ClassVar[bool] = False

    are_vectors: tuple[bool, ...]

    def __call__(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor) -> Tensor:
        """Return the merged blocks."""
        base, (epsilon, *numbers) = base.float(), floats_CB[:, :, None].unbind(0)
        total = gained = count = torch.zeros_like(base)
        for row, is_vector, gain, scale in zip(rows, self.are_vectors, numbers[::2], numbers[1::2], strict=True):
            held = row.float() * scale
            vector = held if is_vector else held - base
            changed = vector.abs() > epsilon
            kept = torch.where(changed, vector, 0.0)
            total, gained, count = total + kept, gained + kept * gain, count + changed
        return base + torch.where(count == 1, gained, total / count.clamp(min=1.0))


EPSILON = ParameterSpec(
    name="epsilon",
    meaning="an entry that moved no farther counts as unchanged",
    default=1e-5,
    low=0.0,
    high=1e-3,
    minimum=0.0,
    per_expert=False,
)


class RamKernel:
    """What RAM and RAM+ share."""

    reads_factors: ClassVar[bool] = False
    differentiable: bool = False  # an entry jumps when epsilon passes it
    local: bool = True

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: Any,  # noqa: ARG002
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``RamTile``; row 0 of the weights is epsilon, the others are the gains."""
        experts = [expert for expert in sources.experts if isinstance(expert, Dense)]
        assert len(experts) == sources.num_experts
        epsilon_B, *gains_KB = sources.spread(weights_KS.float())
        columns = [epsilon_B]
        for expert, gain_B in zip(experts, gains_KB, strict=True):
            columns += [gain_B, torch.ones_like(gain_B) if expert.scales_B is None else expert.scales_B]
        tile = RamTile(tuple(expert.is_task_vector for expert in experts))
        rows = [expert.buffer_P for expert in experts]
        launch(tile, out_P, sources.layout.runs(changed), sources.base_P, rows, [torch.stack(columns)])


class Ram(RamKernel):
    """RAM: what one expert alone changed is kept whole, what several changed is averaged over those.

        theta = base + sum_{k in A} tau_k / |A|
        A = the experts with |tau_k| > epsilon, entry by entry

    When to use: experts trained by reinforcement, whose task vectors are sparse, so that an average over all experts
    would dilute what only one of them changed. Not for ordinary fine-tunes, which change most entries: it is nearly
    their plain mean. Experts have no coefficients, and there are no gradients.
    Reference: Yuan et al. 2026 (Reinforced Agent Merging), arxiv.org/abs/2601.13572; mergekit's ``ram``.
    """

    name: ClassVar[str] = "ram"

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (EPSILON,)

    def prepare(self, sources: Sources, values: Values, earlier: int | None) -> int:  # noqa: ARG002
        """Nothing to prepare but K, which no parameter tells."""
        return sources.num_experts

    def weights(self, values: Values, state: int) -> Tensor:
        """Epsilon, and gains of 1."""
        epsilon_1S = values["epsilon"]
        return torch.cat([epsilon_1S, torch.ones_like(epsilon_1S).expand(state, -1)])


@dataclass(frozen=True, slots=True, eq=False)
class Overlaps:
    """Of each expert and tensor the entries shared with others over those of its own, (K, S), at an epsilon (1, S)."""

    epsilon_1S: Tensor
    ratios_KS: Tensor


class RamPlusTl(RamKernel):
    """RAM+: RAM whose entries of one expert alone are strengthened, the more of that expert is averaged elsewhere.

        theta = base + (1 + r min(shared_k / unique_k, alpha)) tau_k where k alone changed
        theta = base + sum_{k in A} tau_k / |A| elsewhere, as ram

    shared_k and unique_k count, per tensor ("tl"), the entries that expert k changed together with others and alone.
    When to use: as ``ram``, where experts overlap so much that their averages are too weak; r is cheap to search.
    Reference: Yuan et al. 2026, arxiv.org/abs/2601.13572 (RAM+, its tensor-level form); mergekit's ``ramplus_tl``.
    """

    name: ClassVar[str] = "ramplus_tl"

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="r",
                meaning="how much what is an expert's alone is strengthened",
                default=0.1,
                low=0.0,
                high=1.0,
                minimum=0.0,
                per_expert=False,
            ),
            ParameterSpec(
                name="alpha",
                meaning="shared over own entries from which they are strengthened no further",
                default=0.2,
                low=0.0,
                high=2.0,
                minimum=0.0,
                per_expert=False,
            ),
            replace(EPSILON, structural=True),
        )

    def prepare(self, sources: Sources, values: Values, earlier: Overlaps | None) -> Overlaps:
        """Count shared and own entries, in tensors whose epsilon is another than before."""
        epsilon_1S, num_experts = values["epsilon"], sources.num_experts
        ratios_KS = torch.zeros(num_experts, sources.num_tensors, dtype=torch.float64)
        for s, epsilon in enumerate(epsilon_1S[0].tolist()):
            if earlier and earlier.epsilon_1S[0, s] == epsilon:
                ratios_KS[:, s] = earlier.ratios_KS[:, s]
                continue
            shared_K, own_K = (torch.zeros(num_experts, dtype=torch.int64, device=sources.device) for _ in range(2))
            for rows, _ in sources.chunks(s):
                changed_KE = (sources.task_vectors(s, rows).abs() > epsilon).flatten(1)
                alone_E = changed_KE.sum(0) == 1
                own_K += (changed_KE & alone_E).sum(1)
                shared_K += (changed_KE & ~alone_E).sum(1)
            ratios_KS[:, s] = (shared_K / own_K.clamp(min=1)).cpu()  # of none there is none to strengthen
        return Overlaps(epsilon_1S.clone(), ratios_KS)

    def weights(self, values: Values, state: Overlaps) -> Tensor:
        """Epsilon, and the gains."""
        gains_KS = 1 + values["r"] * torch.minimum(state.ratios_KS, values["alpha"])
        return torch.cat([values["epsilon"], gains_KS])
