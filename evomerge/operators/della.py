"""DELLA: drop entries of each task vector at random, small ones rather than large ones.

Shape letters: K experts, P padded elements, R rows and N columns of a matrix.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.kernels.masked import Trims
from evomerge.kernels.sources import Sources
from evomerge.operators.dare import Masses, drawn_gain, drawn_masses
from evomerge.operators.operator import Values
from evomerge.operators.trimmed import (
    SCALE,
    Trimmed,
    TrimmedOptions,
    TrimmedSum,
    TrimState,
    coefficient,
    density,
)
from evomerge.records import Options, ParameterSpec

HIGHEST = 2**15 - 1  # the largest int16: ranks are held in so many steps


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """ranks_KP: int16, two bytes an entry and expert. masses: for the factors, where these are "l1"."""

    ranks_KP: Tensor
    masses: Masses


class DellaLinearOptions(TrimmedOptions):
    """seed: of the draws. epsilon: how far the probabilities of the smallest and the largest are from the density.

    rescale: "probability" divides each entry that is kept by its own probability, as in the paper: right on average.
    "l1", mergekit's, gives their magnitudes the sum of the whole task vector's, tensor by tensor. "none" leaves them.
    """

    seed: int = Field(default=0, ge=0, lt=2**31)
    epsilon: float = Field(default=0.15, ge=0.0, lt=0.5)
    rescale: Literal["probability", "l1", "none"] = "probability"


class DellaOptions(DellaLinearOptions):
    """normalize: divide by the summed coefficients of the entries that agree."""

    normalize: bool = True


class _Ranked(Trimmed):
    """The parameters, and which entries are kept.

    Probabilities are no others than 0 .. 1: densities are defined from epsilon to 1 - epsilon, and a campaign or a
    recipe that asks for another is refused when it is read. (Clipping the probabilities would keep another fraction
    than was asked for.)
    """

    options_type: ClassVar[type[Options]] = DellaLinearOptions

    def __init__(self, options: DellaLinearOptions | None = None) -> None:
        self.options: DellaLinearOptions = options or DellaLinearOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            coefficient(1.0, 0.0, 1.0, self.vote),
            density("at random, large magnitudes rather than small ones", 0.7, 0.2, 0.9, margin=self.options.epsilon),
            SCALE,
        )

    def prepare(self, sources: Sources, values: Values, earlier: TrimState[Ranks] | None) -> TrimState[Ranks]:
        """Rank the magnitudes the first time; later only the probabilities change."""
        spread, seed, rescale = 2 * self.options.epsilon, self.options.seed, self.options.rescale
        if earlier:
            held = earlier.cache
        else:
            ranks_KP = magnitude_ranks(sources)
            held = Ranks(ranks_KP, drawn_masses(sources, seed, spread, ranks_KP) if rescale == "l1" else [])
        lowest_KS = values["density"] - self.options.epsilon
        gain_KS = drawn_gain(held.masses, lowest_KS) if rescale == "l1" else torch.ones_like(lowest_KS)
        return TrimState(
            held,
            Trims(
                "rank",
                gain_KS,
                cut_KS=lowest_KS,
                spread=spread,
                ranks_KP=held.ranks_KP,
                unbiased=rescale == "probability",
                seed=seed,
            ),
        )


def magnitude_ranks(sources: Sources) -> Tensor:
    """Return the ranks of the task vectors' magnitudes within their rows, (K, P) int16, 0 .. 32767; padding is 0."""
    ranks_KP = torch.zeros(sources.num_experts, len(sources.base_P), dtype=torch.int16, device=sources.device)
    for k in range(sources.num_experts):
        for s in range(sources.num_tensors):
            for rows, place in sources.chunks(s):
                ranks_KP[k, place] = _row_ranks(sources.task_vector(k, s, rows).abs_()).flatten()
    return ranks_KP


def _row_ranks(magnitudes_RN: Tensor) -> Tensor:
    """Return the rows' ranks, int16; those of equal magnitudes are their mean."""
    num_columns = magnitudes_RN.shape[1]
    if num_columns == 1:
        return torch.full_like(magnitudes_RN, (HIGHEST + 1) // 2, dtype=torch.int16)
    ascending_RN, order_RN = magnitudes_RN.sort(dim=1)
    place_N = torch.arange(num_columns, device=magnitudes_RN.device)
    differs = ascending_RN[:, 1:] != ascending_RN[:, :-1]
    edge = differs.new_ones(len(differs), 1)
    first_RN = torch.where(torch.cat([edge, differs], dim=1), place_N, 0).cummax(dim=1).values
    last_RN = torch.where(torch.cat([differs, edge], dim=1), place_N, num_columns).flip(1).cummin(dim=1).values.flip(1)
    scaled_RN = ((first_RN + last_RN).double() * HIGHEST / (2 * (num_columns - 1))).round().to(torch.int16)
    return torch.empty_like(scaled_RN).scatter_(1, order_RN, scaled_RN)


class Della(_Ranked):
    """DELLA: small entries are dropped rather than large ones, and what is left is put to TIES' vote and averaged.

        theta = base + scale * sum_{k in A} c_k t_k / sum_{k in A} c_k
        t_k as in della_linear
        A = the experts with sign(c_k t_k) = sign(sum_j c_j t_j), entry by entry

    When to use: as ``dare_ties``, usually with less noise for the same density. It has no gradients, and holds two
    bytes an entry and expert.
    Reference: Deep et al. 2024, arxiv.org/abs/2406.11617; mergekit's ``della``.
    """

    name: ClassVar[str] = "della"
    options_type: ClassVar[type[Options]] = DellaOptions

    def __init__(self, options: DellaOptions | None = None) -> None:
        super().__init__(options or DellaOptions())


class DellaLinear(TrimmedSum, _Ranked):
    """DELLA without a vote: drop entries of each task vector at random, small ones rather than large ones.

        theta = base + scale * sum_k c_k t_k
        t_k = m_k * tau_k / p_k, m_k = 1 with probability p_k, else 0
        p_k = density - epsilon + 2 epsilon r_k

    r_k is the rank of an entry's magnitude in its row of a matrix (a vector is one row), from 0 (smallest) to 1.
    Entries of equal magnitude share their mean rank, so that none is preferred for its place; in a row of one entry the
    rank is 1/2 (mergekit's is 0 / 0 there, and fails). The draws are DARE's.
    When to use: as ``dare_linear``, usually with less noise for the same density. It holds two bytes an entry and
    expert, and sorts every row once.
    Reference: Deep et al. 2024, arxiv.org/abs/2406.11617; mergekit's ``della_linear``.
    """

    name: ClassVar[str] = "della_linear"
