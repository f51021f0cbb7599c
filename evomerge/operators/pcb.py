"""PCB-Merging: entries weigh by how large they are in their task vector, and how well the others agree.

Shape letters: K experts, S tensors, E entries of a piece, R ratios.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.linear import Lincomb
from evomerge.operators.operator import Values
from evomerge.operators.order_statistics import order_statistics
from evomerge.records import Options, ParameterSpec

CLAMPED = 0.01  # of the magnitudes, at either end


@dataclass(frozen=True, slots=True, eq=False)
class PcbState:
    """The balanced task vectors in the experts' place, and each task vector's range of clamped magnitudes (K, 2)."""

    directions: Sources
    bounds_K2: Tensor


class Pcb(Lincomb):
    """PCB-Merging: entries weigh by how large they are in their task vector, and how well the others agree.

        theta = base + sum_k c_k b_k clamp(tau_k) / max(sum_j b_j, 1e-12)

    Over the whole model: the magnitudes |tau_k| are clamped to the range from their 1 to their 99 %; h_k is clamped
    |tau_k| scaled to [0, 1]; the score of an entry is exp(K h_k^2) tanh(tau_k sum_j sign(tau_j) h_j), large where the
    entry is ("intra-balancing") and where the others agree ("inter-balancing"); the balancing weight b_k is the score
    from its (1 - ratio) quantile up, scaled to [0, 1]. (If all of what is scaled is equal, it becomes 0.)

    The scores do not depend on the coefficients, in which the merge is linear: what they multiply is made once for a
    ratio and held in the model's dtype, as large as all the experts together. The quantiles are exact; they depend on
    the sources alone, so that tensors may have ratios of their own.
    When to use: many experts that get in each other's way, and memory for them twice: after preparing, a candidate is a
    weighted sum with gradients. Fix ``ratio``, as a new one balances again in three passes.
    Reference: Du et al. 2024, arxiv.org/abs/2410.02396. Of the three formulas of the official code, which differ in the
    agreement, this is the one of its vision experiments; coefficient and ratio are from there.
    """

    name: ClassVar[str] = "pcb"
    reads_factors: ClassVar[bool] = False

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="coefficient", meaning="weight of a balanced task vector", default=1.2, low=0.8, high=1.3
            ),
            ParameterSpec(
                name="ratio",
                meaning="fraction of the entries of each task vector that is kept, largest scores first",
                default=0.05,
                low=0.01,
                high=0.5,
                minimum=0.0,
                maximum=1.0,
                per_expert=False,
                structural=True,
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: PcbState | None) -> PcbState:
        """Find the ranges of magnitudes and scores, then balance: five passes over the sources, later three."""
        bounds_K2 = earlier.bounds_K2 if earlier else _magnitude_bounds(sources)
        ratios_S = values["ratio"][0].tolist()
        ratios_R = sorted(set(ratios_S))
        num = sum(tensor.num_elements for tensor in sources.layout.tensors)
        ranks = [min(int(num * (1 - ratio)), num - 1) for ratio in ratios_R]
        scores = order_statistics(lambda: (score for *_, score in _scores(sources, bounds_K2)), [*ranks, num - 1])
        low_KR, high_K1 = scores[:, :-1], scores[:, -1:]
        if earlier:
            buffers = [expert.buffer_P for expert in earlier.directions.experts if isinstance(expert, Dense)]
        else:
            buffers = [torch.zeros_like(sources.base_P) for _ in range(sources.num_experts)]
        for s, place, clamped_KE, score_KE in _scores(sources, bounds_K2):
            low_K1 = low_KR[:, [ratios_R.index(ratios_S[s])]]
            balance_KE = _scaled(score_KE, low_K1, high_K1).clamp(min=0.0)
            balanced_KE = clamped_KE * balance_KE / balance_KE.sum(0).clamp(min=1e-12)
            for buffer_P, balanced_E in zip(buffers, balanced_KE, strict=True):
                buffer_P[place] = balanced_E.to(buffer_P.dtype)
        experts = tuple(Dense(buffer_P, is_task_vector=True) for buffer_P in buffers)
        return PcbState(replace(sources, experts=experts), bounds_K2)

    def directions(self, sources: Sources, state: PcbState) -> Sources:  # noqa: ARG002
        """The balanced task vectors."""
        return state.directions

    def weights(self, values: Values, state: PcbState) -> Tensor:  # noqa: ARG002
        """The coefficients are the weights; the base counts once."""
        coefficients_KS = values["coefficient"]
        return torch.cat([torch.ones_like(coefficients_KS[:1]), coefficients_KS])


def _pieces(sources: Sources) -> Iterator[tuple[int, slice, Tensor]]:
    """Walk the whole model: (tensor, place in the buffers, task vectors (K, E))."""
    for s in range(sources.num_tensors):
        for rows, place in sources.chunks(s):
            yield s, place, sources.task_vectors(s, rows).flatten(1)


def _magnitude_bounds(sources: Sources) -> Tensor:
    """Return what the magnitudes of each task vector are clamped to, (K, 2)."""
    num = sum(tensor.num_elements for tensor in sources.layout.tensors)
    low = int(num * CLAMPED)
    high = max(int(num * (1 - CLAMPED)) - 1, low)
    return order_statistics(lambda: (vectors_KE.abs() for *_, vectors_KE in _pieces(sources)), [low, high])


def _scores(sources: Sources, bounds_K2: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Walk the whole model: (tensor, place, clamped task vectors (K, E), scores (K, E))."""
    low_K1, high_K1 = bounds_K2.split(1, dim=1)
    for s, place, vectors_KE in _pieces(sources):
        sign_KE, size_KE = vectors_KE.sign(), vectors_KE.abs().clamp(low_K1, high_K1)
        height_KE = _scaled(size_KE, low_K1, high_K1)
        agreement_KE = torch.tanh(vectors_KE * (sign_KE * height_KE).sum(0))
        yield s, place, sign_KE * size_KE, torch.exp(sources.num_experts * height_KE**2) * agreement_KE


def _scaled(numbers_KE: Tensor, low_K1: Tensor, high_K1: Tensor) -> Tensor:
    """Map low..high to 0..1, and everything to 0 where they are equal."""
    range_K1 = high_K1 - low_K1
    return torch.where(range_K1 > 0, (numbers_KE - low_K1) / range_K1, 0.0)
