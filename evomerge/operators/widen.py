"""WIDEN: weigh each column of a matrix by how much its length and its direction moved, against the other columns.

Shape letters: K experts, S tensors, V vectors of one tensor, M measures of change.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.kernels.sources import Sources
from evomerge.operators.operator import Values
from evomerge.operators.vectors import Vectors, inner_products, lincomb_vectors
from evomerge.records import Options, ParameterSpec

EMBEDDING = re.compile(r"(?:embed_tokens|embed_positions|_embeddings?|wte|wpe|shared)\.weight$")
"""Tables of which a row, not a column, is what one input selects."""


@dataclass(frozen=True, slots=True, eq=False)
class WidenState:
    """Each tensor's ranks (M, K, V) of 0..V-1, made once, and the present cut-offs t (S,)."""

    ranks: list[Tensor]
    t_S: Tensor


class Widen:
    """WIDEN: each column of a matrix is weighed by how much it changed, against the expert's other columns.

        theta = base + sum_k score_k tau_k
        score_k = (score of the length + score of the direction) / 2

    Within each expert the V columns (inputs) are ranked by how much their length changed, and again by how much their
    direction did. A column's score of a measure is the softmax across experts of rank / V, or ``s`` where the rank
    exceeds t times the mean rank. Vectors are ranked element by element, by |tau| alone; embeddings by row. A column
    that matters to all K experts gets a total of K s: scores are not normalized again.

    The paper's t and s are 1: about the upper half of the columns is taken over whole.
    When to use: experts that went unequally far, such as one of continued pretraining among fine-tunes, for which it
    was made. Two numbers, or none, are all there is to search: experts have no coefficients, and there are no
    gradients.
    Reference: Yu et al. 2024, arxiv.org/abs/2408.03092, and its code (MergeLLM).
    """

    name: ClassVar[str] = "widen"
    reads_factors: ClassVar[bool] = True
    differentiable: bool = False  # a tensor has a weight for each column
    local: bool = True

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="t",
                meaning="rank, in units of the mean rank, above which a change counts as important",
                default=1.0,
                low=0.0,
                high=2.0,
                minimum=0.0,
                per_expert=False,
                structural=True,
            ),
            ParameterSpec(
                name="s", meaning="score of an important change", default=1.0, low=0.0, high=1.5, per_expert=False
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: WidenState | None) -> WidenState:
        """Rank the changes the first time."""
        ranks = earlier.ranks if earlier else [_ranks(sources, s) for s in range(sources.num_tensors)]
        return WidenState(ranks, values["t"][0])

    def weights(self, values: Values, state: WidenState) -> Tensor:
        """The base counts once; in the other rows, what an important change counts."""
        score_1S = values["s"]
        return torch.cat([torch.ones_like(score_1S), score_1S.expand(state.ranks[0].shape[1], -1)])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: WidenState,
        changed: Sequence[int] | None = None,
    ) -> None:
        """Weigh each column, row or element."""
        for s in range(sources.num_tensors) if changed is None else changed:
            ranks_MKV = state.ranks[s].double()
            num_vectors = ranks_MKV.shape[2]
            important_MKV = 2 * ranks_MKV > state.t_S[s] * (num_vectors - 1)  # the mean rank is (V - 1) / 2
            softmax_MKV = (ranks_MKV / num_vectors).softmax(dim=1)
            scores_KV = torch.where(important_MKV, weights_KS[1:, s, None], softmax_MKV).mean(0)
            weights_KV = torch.cat([torch.ones_like(scores_KV[:1]), scores_KV])
            lincomb_vectors(out_P, sources, s, weights_KV, _vectors_of(sources, s))


def _vectors_of(sources: Sources, s: int) -> Vectors:
    tensor = sources.layout.tensors[s]
    return "rows" if len(tensor.shape) == 2 and EMBEDDING.search(tensor.name) else "columns"


def _ranks(sources: Sources, s: int) -> Tensor:
    """Return the ranks (M, K, V), int32, of the changes of length and direction, or of |tau| if V are elements.

    Written with task vectors, without the cancellation in |w| - |b| and in 1 - cos of two nearly equal columns.
    """
    products = inner_products(sources, s, _vectors_of(sources, s))
    square_V1, cross_VK = products[:, 0, :1], products[:, 0, 1:]  # |b|^2, <b, tau>
    moved_VK = products.diagonal(dim1=1, dim2=2)[:, 1:]  # |tau|^2
    if sources.layout.tensors[s].matrix[0] == 1:
        changes_MVK = moved_VK[None]
    else:
        grown_VK = 2 * cross_VK + moved_VK  # |w|^2 - |b|^2
        before_V1, after_VK = square_V1.sqrt(), (square_V1 + grown_VK).clamp(min=0.0).sqrt()
        length_VK = grown_VK.abs() / torch.where(grown_VK == 0, 1.0, before_V1 + after_VK)
        both_VK = before_V1 * after_VK
        turned_VK = (moved_VK - length_VK**2) / (2 * torch.where(both_VK > 0, both_VK, 1.0))  # 1 - cos
        # A column that was or became zero has no direction: its cosine counts as 0, as long as it moved at all.
        changes_MVK = torch.stack([length_VK, torch.where(both_VK > 0, turned_VK, (moved_VK > 0).double())])
    order_MKV = changes_MVK.mT.argsort(dim=2, stable=True)
    return order_MKV.argsort(dim=2).to(torch.int32)
