"""KnOTS: task vectors are merged in the one frame in which their common SVD puts them.

Side by side, [tau_1 ... tau_K] = U diag(sigma) [V_1^T ... V_K^T], so that tau_k = U (diag(sigma) V_k^T).

Shape letters: K experts, S tensors, P padded elements; M rows and N columns of a matrix, R a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from evomerge.kernels.layout import BLOCK, Layout
from evomerge.kernels.masked import masked_consensus
from evomerge.kernels.sources import Dense, Sources
from evomerge.kernels.tiles import Vote
from evomerge.operators.decompositions import TaskVectors, svd
from evomerge.operators.operator import Values
from evomerge.operators.ties import Ties, TiesState
from evomerge.records import Options, ParameterSpec, TensorInfo


@dataclass(frozen=True, slots=True, eq=False)
class KnotsState:
    """frames: U (M, R) of each matrix, None of other tensors. aligned: the experts in their frames, on a base of zero.

    ties: the sorted magnitudes and the trims, of the experts in their frames.
    """

    frames: tuple[Tensor | None, ...]
    aligned: Sources
    ties: TiesState


class KnotsOptions(Options):
    """merge: in the frame, trim and elect as TIES does, or trim and sum (with density 1: task arithmetic)."""

    merge: Literal["ties", "sum"] = "ties"


class Knots:
    """KnOTS: task vectors are merged in the one frame in which their common SVD puts them.

        theta = base + scale * U merge(diag(sigma) V_1^T, ..., diag(sigma) V_K^T)
        [tau_1 ... tau_K] = U diag(sigma) [V_1^T ... V_K^T]

    What tells experts apart is the second factor, and there entries of the same place speak of the same direction.
    Tensors that are no matrices are merged as they are. For checkpoints it holds K + 1 buffers of them in float32, and
    as much as one more of frames; preparing takes one SVD a matrix, of (M, K N) in float64, as the official code does
    it.
    When to use: LoRA adapters that ``ties`` merges badly because each speaks of its own directions; their frame is
    small. Not for checkpoints, unless they are small, and not where gradients are wanted.
    Reference: Stoica et al. 2025, arxiv.org/abs/2410.19735.
    Departures: a density is of each tensor, where the official code keeps the largest entries of all layers together;
    directions are cut at the numerical rank instead of at sigma = 1e-5. 0.2 and 0.6 are its numbers for vision models
    (language models: 1 and 0.5).
    """

    name: ClassVar[str] = "knots"
    reads_factors: ClassVar[bool] = True
    differentiable: bool = False
    local: bool = True

    options_type: ClassVar[type[Options]] = KnotsOptions

    def __init__(self, options: KnotsOptions | None = None) -> None:
        self.options = options or KnotsOptions()
        elects = self.options.merge == "ties"
        self._vote = Vote(elect="weighted", divide="weights") if elects else Vote()
        self._ties = Ties()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="coefficient",
                meaning="weight of a task vector",
                default=1.0,
                low=0.0,
                high=1.0,
                minimum=0.0 if elects else float("-inf"),  # agreeing entries are divided by their summed weight
            ),
            ParameterSpec(
                name="density",
                meaning="fraction of each task vector that is kept in the common frame, largest magnitudes first",
                default=0.2 if elects else 1.0,
                low=0.05,
                high=1.0,
                minimum=0.0,
                maximum=1.0,
                structural=True,
            ),
            ParameterSpec(
                name="scale",
                meaning="factor on the merged task vector",
                default=0.6 if elects else 1.0,
                low=0.1,
                high=3.0,
                per_expert=False,
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: KnotsState | None) -> KnotsState:
        """Find the frames, once; trim by the present densities."""
        frames, aligned = (earlier.frames, earlier.aligned) if earlier else _align(sources)
        return KnotsState(frames, aligned, self._ties.prepare(aligned, values, earlier.ties if earlier else None))

    def weights(self, values: Values, state: KnotsState) -> Tensor:  # noqa: ARG002
        """Row 0 scales the merged task vector, the others weigh the experts'."""
        return torch.cat([values["scale"], values["coefficient"]])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: KnotsState,
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``masked_consensus`` in the frames, then turn each tensor back and add the base; round once."""
        aligned_P = torch.empty_like(state.aligned.base_P)
        masked_consensus(aligned_P, state.aligned, weights_KS, state.ties.trims, self._vote, changed)
        views, layout = state.aligned.layout.views(aligned_P), sources.layout
        for s in range(sources.num_tensors) if changed is None else changed:
            segment, [run], frame = layout.segments[s], layout.runs([s]), state.frames[s]
            vector = views[layout.tensors[s].name]
            merged = sources.base(s) + (vector if frame is None else frame @ vector)
            out_P[segment] = merged.flatten().to(out_P.dtype)
            out_P[segment.stop : run.stop * BLOCK] = 0


def _align(sources: Sources) -> tuple[tuple[Tensor | None, ...], Sources]:
    """Return the frames, and the task vectors in them, float32."""
    frames: list[Tensor | None] = []
    aligned: list[Sequence[Tensor]] = []
    for s, tensor in enumerate(sources.layout.tensors):
        vectors = TaskVectors.of(sources, s)
        frame, rows = common_frame(vectors) if len(tensor.shape) == 2 else (None, vectors.cores)
        frames.append(frame)
        aligned.append(rows)
    tensors = zip(sources.layout.tensors, aligned, strict=True)
    layout = Layout.of(tuple(TensorInfo(tensor.name, tuple(vectors[0].shape)) for tensor, vectors in tensors))
    zero_P, *buffers = (torch.zeros(layout.num_padded, device=sources.device) for _ in range(1 + sources.num_experts))
    for segment in layout.segments:
        for buffer_P, vector in zip(buffers, aligned.pop(0), strict=True):
            buffer_P[segment] = vector.flatten()
    return tuple(frames), Sources(layout, zero_P, tuple(Dense(held, is_task_vector=True) for held in buffers))


def common_frame(vectors: TaskVectors) -> tuple[Tensor, Sequence[Tensor]]:
    """Return U (M, R) and each diag(sigma) V_k^T (R, N), float32; of zero task vectors one direction of zeros."""
    cores: Sequence[Tensor] = vectors.cores
    if vectors.frame is not None:
        cores = [core @ vectors.frame[1] for core in cores]
    found = svd(torch.cat(list(cores), dim=1).double())
    left_MR = found.u if len(found.s) else found.u.new_zeros(len(found.u), 1)
    # U^T tau_k is diag(sigma) V_k^T, and keeps zeros: TIES counts any other entry, however small, as a vote.
    rows = [(left_MR.T @ core.double()).float() for core in cores]
    return left_MR.float() if vectors.frame is None else vectors.frame[0] @ left_MR.float(), rows
