"""Arcee Fusion: of one expert, the entries that matter most replace the base's.

Shape letters: S tensors, R rows and C columns of a tensor as a matrix, E entries of a tensor.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Sources
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec

Importances = list[tuple[Tensor, float]]
"""Of each tensor: the divergence of each row (R, 1), and the importance that an entry must exceed."""

KEPT_APART = 1e-8  # upstream's, added to both probabilities before they are divided


class ArceeFusion:
    """Arcee Fusion: of one expert, the entries that matter most replace the base's.

        theta = expert where importance > median + 1.5 (upper quartile - lower), else base
        importance = |expert - base| KL(softmax(expert's row) || softmax(base's row))

    The bound is the usual one for outliers, per tensor. A vector is one row (its divergence is then a common factor and
    cancels). Median and quartiles are entries of the tensor, the lower of two that are equally near.
    When to use: one expert and no evaluations to spend. There is nothing to set and nothing to search; for anything
    between base and expert take ``task_arithmetic`` or ``nearswap``.
    Reference: mergekit's ``arcee_fusion``; the formula is not published, and was found by fitting reference merges.
    Departures: quantiles are exact for tensors of any size (there, above a million entries, of a random sample, so that
    merging again gives another model), and divergences are computed in float64 (in float32 the divergence of two rows
    of 4,096 that differ by 2e-4, 2e-8, is lost among the roundings of the probabilities).
    """

    name: ClassVar[str] = "arcee_fusion"
    reads_factors: ClassVar[bool] = False
    differentiable: bool = False
    local: bool = True

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = ()

    def prepare(self, sources: Sources, values: Values, earlier: Importances | None) -> Importances:  # noqa: ARG002
        """Find each row's divergence and each tensor's bound. Raises: InputError unless there is one expert."""
        if sources.num_experts != 1:
            raise InputError(
                f"arcee_fusion: expected one expert (whose entries replace the base's), found {sources.num_experts}; "
                "name one, or choose another operator"
            )
        if earlier:
            return earlier
        found = []
        for s, tensor in enumerate(sources.layout.tensors):
            divergences_R1 = torch.cat([_divergences(sources, s, rows) for rows, _ in sources.chunks(s)])
            importances = [_importances(sources, s, rows, divergences_R1).view(-1) for rows, _ in sources.chunks(s)]
            importances_E, last = torch.cat(importances), tensor.num_elements - 1
            lower, median, upper = (
                float(importances_E.kthvalue(quarters * last // 4 + 1).values) for quarters in (1, 2, 3)
            )
            found.append((divergences_R1, median + 1.5 * (upper - lower)))
        return found

    def weights(self, values: Values, state: Importances) -> Tensor:  # noqa: ARG002
        """Nothing is weighed."""
        return torch.ones(2, len(state), dtype=torch.float64)

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,  # noqa: ARG002
        state: Importances,
        changed: Sequence[int] | None = None,
    ) -> None:
        """Copy each entry from where it comes."""
        for s in range(sources.num_tensors) if changed is None else changed:
            divergences_R1, bound = state[s]
            for rows, place in sources.chunks(s):
                matters = _importances(sources, s, rows, divergences_R1) > bound
                fused = torch.where(matters, sources.expert(0, s, rows), sources.base(s, rows))
                out_P[place] = fused.view(-1).to(out_P.dtype)
            end = sources.layout.segments[s].stop
            out_P[end : -(-end // BLOCK) * BLOCK] = 0.0


def _divergences(sources: Sources, s: int, rows: slice) -> Tensor:
    """Return the divergence of each row of the expert from the base's, (R, 1)."""
    expert_RC, base_RC = (held.double().softmax(1) for held in (sources.expert(0, s, rows), sources.base(s, rows)))
    ratio_RC = (expert_RC + KEPT_APART) / (base_RC + KEPT_APART)
    return (expert_RC * ratio_RC.log()).sum(1, keepdim=True)


def _importances(sources: Sources, s: int, rows: slice, divergences_R1: Tensor) -> Tensor:
    return (sources.task_vector(0, s, rows).abs() * divergences_R1[rows]).float()
