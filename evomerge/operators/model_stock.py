"""Model Stock: go from the base towards the experts' mean, as far as their task vectors agree.

Shape letters: K experts, S tensors, V vectors (tensors, or the rows of one tensor).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evomerge.errors import CampaignError
from evomerge.kernels.sources import Sources
from evomerge.operators.linear import Lincomb
from evomerge.operators.operator import Values
from evomerge.operators.vectors import angles, lincomb_vectors, vectors_of
from evomerge.records import Options, ParameterSpec

CANCELLED = 1e-6
"""Of 1 + (K - 1) c: below, the task vectors' directions sum to nothing, and the ratio has no value."""


class ModelStockOptions(Options):
    """vectors: what the angles are between: whole tensors, or each row (filter) of a matrix by itself."""

    vectors: Literal["tensor", "rows"] = "tensor"


class ModelStock(Lincomb):
    """Model Stock: from the base towards the experts' mean, as far as their task vectors agree.

        theta = base + scale * r * sum_k tau_k / K
        r = K c / (1 + (K - 1) c), c = mean cosine of tau_j and tau_k, j < k

    The paper has no ``scale``. As in mergekit, r is not kept within 0..1: where task vectors point apart (c < 0) the
    merge moves away from their mean. Unlike there, the cosine of small updates is exact (mergekit divides by at least
    1e-6), and r is 0 where the directions cancel.
    When to use: fine-tunes of one task with other seeds or settings, and no evaluations to spend: nothing need be
    searched. Not for different skills: their task vectors are nearly perpendicular, and the merge stays near the base.
    Reference: Jang et al. 2024, arxiv.org/abs/2403.19522; mergekit's ``model_stock``.
    """

    name: ClassVar[str] = "model_stock"

    options_type: ClassVar[type[Options]] = ModelStockOptions

    def __init__(self, options: ModelStockOptions | None = None) -> None:
        self.options = options or ModelStockOptions()
        self.differentiable = self.options.vectors == "tensor"  # otherwise a tensor has many weights
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="scale",
                meaning="factor on the way towards the mean",
                default=1.0,
                low=0.0,
                high=2.0,
                per_expert=False,
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> list[Tensor]:  # noqa: ARG002
        """Return each tensor's weights of the task vectors at scale 1, (K, V)."""
        size = sources.num_experts
        if size < 2:
            raise CampaignError(f"model_stock: expected at least two experts, found {size}; it goes by their angles")
        weights = []
        for s in range(sources.num_tensors):
            _, cosines_VKK = angles(sources, s, self.options.vectors, relative=True)
            pairs_V = cosines_VKK.sum((1, 2)) - cosines_VKK.diagonal(dim1=1, dim2=2).sum(1)
            mean_V = pairs_V / (size * (size - 1))
            divisor_V = 1 + (size - 1) * mean_V
            cancel_V = divisor_V < CANCELLED
            ratio_V = torch.where(cancel_V, 0.0, size * mean_V / torch.where(cancel_V, 1.0, divisor_V))
            weights.append((ratio_V / size).expand(size, -1))
        return weights

    def weights(self, values: Values, state: list[Tensor]) -> Tensor:
        """Of whole tensors, what ``lincomb`` takes; of rows, the scale in every row of the result."""
        scale_1S = values["scale"]
        of_tensors_KS = torch.cat(state, dim=1) if self.options.vectors == "tensor" else torch.ones(len(state[0]), 1)
        return torch.cat([torch.ones_like(scale_1S), scale_1S * of_tensors_KS])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: list[Tensor],
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``lincomb``, or weigh each row."""
        if self.options.vectors == "tensor":
            super().merge(out_P, sources, weights_KS, state, changed)
            return
        for s in range(sources.num_tensors) if changed is None else changed:
            weights_KV = torch.cat([torch.ones_like(state[s][:1]), weights_KS[1:, s, None] * state[s]])
            lincomb_vectors(out_P, sources, s, weights_KV, vectors_of(sources, s, self.options.vectors))
