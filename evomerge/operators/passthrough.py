"""Passthrough: each tensor is one expert's, so that layers of several models can stand in one ("frankenmerge")."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.kernels.layout import BLOCK
from evomerge.kernels.lincomb import lincomb
from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


class Passthrough:
    """Each tensor is one expert's, times a scale; the base is not used.

        theta = scale * expert_k
        k = argmax_j c_j, of equal ones the first

    At a scale of 1 the tensor is copied bit for bit. As in mergekit's method of this name; there the source is given by
    the slices, here also by preferences, which can be searched. A scale of 0 on the output projections of a repeated
    layer makes it begin as the identity.
    When to use: to stack layers of several models ("frankenmerge"), by ``layers`` of a recipe. As a search it knows
    nothing between one expert and another, and has no gradients: ``task_arithmetic`` blends, the data-flow space
    arranges.
    Reference: mergekit's ``passthrough``; Kim et al. 2023, "depth up-scaling", arxiv.org/abs/2312.15166, gives the
    reason to repeat layers at all.
    """

    name: ClassVar[str] = "passthrough"
    reads_factors: ClassVar[bool] = True
    differentiable: bool = False  # the choice of a source jumps
    local: bool = True

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="coefficient",
                meaning="preference: the expert with the largest is the source",
                default=1.0,
                low=0.0,
                high=1.0,
            ),
            ParameterSpec(
                name="scale", meaning="factor on the tensor", default=1.0, low=0.5, high=1.5, per_expert=False
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: None) -> None:
        """Nothing to prepare."""

    def weights(self, values: Values, state: None) -> Tensor:  # noqa: ARG002
        """The scale for the chosen expert, and for the base: s expert = s base + s tau."""
        coefficients_KS, scale_1S = values["coefficient"], values["scale"]
        chosen_KS = torch.zeros_like(coefficients_KS).scatter(0, coefficients_KS.argmax(0, keepdim=True), 1.0)
        return torch.cat([scale_1S, scale_1S * chosen_KS])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: None,  # noqa: ARG002
        changed: Sequence[int] | None = None,
    ) -> None:
        """Copy what has a scale of 1; the rest is a linear combination with one term."""
        chosen_S, scale_S = weights_KS[1:].abs().argmax(0).tolist(), weights_KS[0].tolist()
        copied: dict[int, list[int]] = {}
        rest: list[int] = []
        for s in range(sources.num_tensors) if changed is None else changed:
            expert = sources.experts[chosen_S[s]]
            is_copy = scale_S[s] == 1.0 and isinstance(expert, Dense) and not expert.is_task_vector
            (copied.setdefault(chosen_S[s], []) if is_copy else rest).append(s)
        for k, tensors in copied.items():
            expert = sources.experts[k]
            assert isinstance(expert, Dense)
            for run in sources.layout.runs(tensors):
                blocks = slice(run.start * BLOCK, run.stop * BLOCK)
                out_P[blocks] = expert.buffer_P[blocks].to(out_P.dtype)
        lincomb(out_P, sources, weights_KS, rest)
