"""OPCM: experts are merged one after another, each projected away from what the others before it have used.

Shape letters: K experts, S tensors; M rows and N columns of a matrix, R a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomerge.kernels.sources import Sources
from evomerge.operators.decompositions import Fused, FusedState, Product, svd
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


def add_projected(task_vectors: Sequence[Tensor], alpha: float) -> Tensor:
    """Return the sum (M, N) of the task vectors, each without what lies along the sum of those before it.

    In the frame of that sum's singular vectors, the whole diagonal of a task vector is zeroed, and the block of the
    leading directions: those before the cumulated singular values exceed the share ``alpha``.
    """
    merged = task_vectors[0]
    for vector in task_vectors[1:]:
        found = svd(merged)
        share = found.s.cumsum(0) / found.s.sum()
        share[-1:] = 1.0  # whatever rounding says: alpha = 1 leads to all
        num_leading = int((share <= alpha).sum())
        framed = found.u.T @ vector @ found.vh.T
        dropped = torch.diag(framed.diagonal())
        dropped[:num_leading, :num_leading] = framed[:num_leading, :num_leading]
        merged = merged + (vector - found.u @ dropped @ found.vh)
    return merged


@dataclass(frozen=True, slots=True, eq=False)
class OpcmState(FusedState):
    """mean_norm: of the experts' whole task vectors; norm: of the merged one."""

    mean_norm: float
    norm: float


class Opcm(Fused):
    """OPCM: experts are merged one after another, each projected away from what the others before it have used.

        D_1 = tau_1, D_k = D_{k-1} + P_k(tau_k)
        theta = base + scale * (mean_k |tau_k| / |D_K|) D_K

    P_k zeroes, in the frame of the singular vectors of D_{k-1}, the diagonal and the block of the leading directions,
    which hold the share ``alpha`` of the singular values. Tensors that are no matrices are summed. The norms are of the
    whole model, so that a change of ``alpha`` anywhere scales every tensor. The official code rescales after each
    expert and undoes that before the next, and the projection does not see a scale; so rescaling once, at the end, is
    the same. Preparing takes K - 1 SVDs a matrix. The experts' order matters: that of the campaign.
    When to use: experts that come one after another, the first of which matters most. The scale is cheap and has a
    gradient; alpha has none and costs the SVDs anew. It cannot steer between abilities.
    Reference: Tang et al. 2025, arxiv.org/abs/2501.09522.
    Departures: every matrix is projected, where the official code does linear layers and sums embeddings; pairs of
    singular vectors beyond the numerical rank are arbitrary and left alone; ``alpha`` = 1 drops the whole block, where
    the official code drops none of it.
    """

    name: ClassVar[str] = "opcm"
    local: bool = False
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="alpha",
                meaning="share of the merged singular values whose directions later experts must not touch",
                default=0.5,
                low=0.1,
                high=0.9,
                minimum=0.0,
                maximum=1.0,
                per_expert=False,
                structural=True,
            ),
            ParameterSpec(
                name="scale",
                meaning="factor on the merged task vector",
                default=1.0,
                low=0.3,
                high=3.0,
                per_expert=False,
            ),
        )

    def fuse(self, task_vectors: Sequence[Tensor], numbers: Mapping[str, Tensor], is_matrix: bool) -> Product:
        """Add projected matrices; add whatever else as it is."""
        if is_matrix:
            return add_projected(task_vectors, float(numbers["alpha"])), None
        return torch.stack(list(task_vectors)).sum(0), None

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> OpcmState:
        """Merge what changed, then measure the whole."""
        fused = super().prepare(sources, values, earlier)
        norms = [] if earlier else [_norm(sources, k) for k in range(sources.num_experts)]
        mean_norm = earlier.mean_norm if earlier else sum(norms) / len(norms)
        return OpcmState(fused.directions, fused.values, mean_norm, _norm(fused.directions.sources, 0))

    def weights(self, values: Values, state: OpcmState) -> Tensor:
        """The scale weighs the merged task vector, brought to the mean norm; one of norm zero has nothing to weigh."""
        weights_2S = super().weights(values, state)
        rescale = state.mean_norm / state.norm if state.norm else 1.0
        return weights_2S * torch.tensor([[1.0], [rescale]], dtype=torch.float64)


def _norm(sources: Sources, k: int) -> float:
    """Return the norm of expert k's whole task vector."""
    norms = [
        torch.linalg.vector_norm(sources.task_vector(k, s), dtype=torch.float64) for s in range(sources.num_tensors)
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
