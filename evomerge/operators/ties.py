"""TIES: trim each task vector, elect a sign per element, merge what agrees.

Reference: Yadav et al. 2023, arxiv.org/abs/2306.01708. "ties" is not one thing; this is mergekit's convention, per
tensor: the sign is elected after weighting, and the agreeing entries are divided by the sum of their weights. (The
paper trims over the whole model, elects before weighting and divides by the count.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.operators.kernels import BLOCK, masked_consensus
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


@dataclass(frozen=True, slots=True)
class Trims:
    """Per expert and tensor (K, S): the densities, and the threshold and cutoff that keep exactly that share.

    The ``*_KB`` twins are spread over the blocks, as the kernel wants them.
    """

    densities_KS: Tensor
    thresholds_KS: Tensor
    cutoffs_KS: Tensor
    thresholds_KB: Tensor
    cutoffs_KB: Tensor


class TiesOptions(Options):
    """normalize: divide by the summed weight of the agreeing entries (false: the paper's "disjoint sum")."""

    normalize: bool = True


class Ties:
    """TIES merging, with a density per expert and a scale on the consensus."""

    name: ClassVar[str] = "ties"
    differentiable: ClassVar[bool] = False  # the elected sign jumps with the coefficients

    options_type: ClassVar[type[Options]] = TiesOptions

    def __init__(self, options: TiesOptions | None = None) -> None:
        self.options = options or TiesOptions()
        # A divisor of weights of both signs can nearly cancel and blow an entry up: with normalize they stay positive.
        minimum = 0.0 if self.options.normalize else float("-inf")
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="coefficient", meaning="weight of a task vector", default=1.0, low=0.0, high=1.0, minimum=minimum
            ),
            ParameterSpec(
                name="density",
                meaning="fraction of each task vector that is kept, largest magnitudes first",
                default=0.2,
                low=0.05,
                high=1.0,
                minimum=0.0,
                maximum=1.0,
                structural=True,
            ),
            ParameterSpec(
                name="scale", meaning="factor on the consensus", default=1.0, low=0.3, high=3.0, per_expert=False
            ),
        )

    def prepare(
        self, base_P: Tensor, experts_KP: Tensor, segments: Sequence[slice], values: Values, earlier: Trims | None
    ) -> Trims:
        """Find the thresholds; those whose density did not change are taken from ``earlier``."""
        densities_KS = values["density"]
        thresholds_KS = torch.zeros(densities_KS.shape)
        cutoffs_KS = torch.zeros(densities_KS.shape, dtype=torch.int64)
        for k, expert_P in enumerate(experts_KP):
            for s, segment in enumerate(segments):
                if earlier is not None and earlier.densities_KS[k, s] == densities_KS[k, s]:
                    thresholds_KS[k, s], cutoffs_KS[k, s] = earlier.thresholds_KS[k, s], earlier.cutoffs_KS[k, s]
                else:
                    vector_E = expert_P[segment].float() - base_P[segment].float()
                    threshold, last = keep_largest(vector_E.abs(), float(densities_KS[k, s]))
                    thresholds_KS[k, s], cutoffs_KS[k, s] = threshold, segment.start + last
        device = base_P.device
        blocks = torch.tensor([-(-(segment.stop - segment.start) // BLOCK) for segment in segments])
        spread = [matrix.repeat_interleave(blocks, dim=1).to(device) for matrix in (thresholds_KS, cutoffs_KS)]
        return Trims(densities_KS.clone(), thresholds_KS, cutoffs_KS, *spread)

    def weights(self, values: Values) -> Tensor:
        """Row 0 scales the consensus, the others weigh the task vectors."""
        return torch.cat([values["scale"], values["coefficient"]])

    def merge(self, out_P: Tensor, base_P: Tensor, experts_KP: Tensor, weights_KB: Tensor, state: Trims) -> None:
        """Launch ``masked_consensus``."""
        trims = (state.thresholds_KB, state.cutoffs_KB)
        masked_consensus(out_P, base_P, experts_KP, weights_KB, trims, self.options.normalize)


def keep_largest(magnitudes_E: Tensor, density: float) -> tuple[float, int]:
    """Return (threshold, index) that keep exactly ``max(1, int(density * E))`` of the magnitudes.

    Kept is what lies above the threshold, or on it at an index up to the one returned: rounded checkpoints have many
    equal magnitudes, and "at least the threshold" would keep far more than was asked (0.325 for 0.2 in bfloat16).
    """
    num_elements = magnitudes_E.numel()
    num_kept = min(num_elements, max(1, int(density * num_elements)))
    threshold = magnitudes_E.kthvalue(num_elements - num_kept + 1).values
    quota = num_kept - int((magnitudes_E > threshold).sum())
    on_threshold = (magnitudes_E == threshold).nonzero().flatten()
    return float(threshold), int(on_threshold[quota - 1])
