"""DARE: drop entries of each task vector at random, and make up for it by a factor on the others."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.kernels.masked import Trims, block_keys
from evomerge.kernels.sources import Sources
from evomerge.operators.masks import DrawnMass, uniform_draws
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

Masses = list[list[DrawnMass]]
"""Of every expert, of every tensor."""


class DareOptions(TrimmedOptions):
    """seed: of the draws.

    rescale: "density" divides what is kept by the density, as in the paper: right on average. "l1", mergekit's, gives
    its magnitudes the sum of the whole task vector's, tensor by tensor. "none" leaves it.
    """

    seed: int = Field(default=0, ge=0, lt=2**31)
    rescale: Literal["density", "l1", "none"] = "density"


class _Drawn(Trimmed):
    """The parameters, and which entries are kept."""

    options_type: ClassVar[type[Options]] = DareOptions

    def __init__(self, options: DareOptions | None = None) -> None:
        self.options: DareOptions = options or DareOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            coefficient(0.3, 0.0, 1.0, self.vote),
            density("at random", 0.5, 0.1),
            SCALE,
        )

    def prepare(self, sources: Sources, values: Values, earlier: TrimState[Masses] | None) -> TrimState[Masses]:
        """Find the factors; only "l1" reads the task vectors, once."""
        density_KS, masses = values["density"], earlier.cache if earlier else []
        gain_KS = torch.ones_like(density_KS)
        if self.options.rescale == "density":
            if bool((density_KS == 0).any()):
                raise CandidateError("dare: a density of 0 leaves nothing to divide by it")
            gain_KS = 1 / density_KS
        elif self.options.rescale == "l1":
            masses = masses or drawn_masses(sources, self.options.seed)
            gain_KS = drawn_gain(masses, density_KS)
        return TrimState(masses, Trims("uniform", gain_KS, cut_KS=density_KS, seed=self.options.seed))


def drawn_masses(sources: Sources, seed: int, spread: float = 0.0, ranks_KP: Tensor | None = None) -> Masses:
    """Return a table of every expert and tensor; draws less ``spread`` times the entries' ranks, if these are given."""
    keys_KB = block_keys(sources, seed)

    def pieces(k: int, s: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, place in sources.chunks(s):
            draws_E = uniform_draws(keys_KB[k], place)
            if ranks_KP is not None:
                draws_E -= spread / 32767 * ranks_KP[k, place]
            yield draws_E, sources.task_vector(k, s, rows).abs_().flatten()

    return [
        [DrawnMass.of(pieces(k, s), tensor.num_elements, -spread) for s, tensor in enumerate(sources.layout.tensors)]
        for k in range(sources.num_experts)
    ]


def drawn_gain(masses: Masses, limits_KS: Tensor) -> Tensor:
    """Return the factors (K, S) that give the drawn entries the sum of magnitudes of all."""
    rows = [
        [table.gain(limit) for table, limit in zip(tables, limits, strict=True)]
        for tables, limits in zip(masses, limits_KS.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


class DareLinear(TrimmedSum, _Drawn):
    """DARE: drop entries of each task vector at random, and make up for it by a factor on the others.

        theta = base + scale * sum_k c_k t_k
        t_k = m_k * tau_k / density
        m_k = 1 with probability density, else 0, entry by entry

    The draws are a hash of (seed, expert, tensor, place): all candidates of a run meet the same ones, and a larger
    density keeps what a smaller one kept. Upstream codes draw from one generator after the other, so that there a mask
    depends on everything merged before it.
    When to use: large models whose task vectors are redundant; the paper drops nine entries in ten and more. On average
    this is ``task_arithmetic``, plus noise, which is the larger the smaller density and model are: compare with that
    first. A new density takes 2 to 3 times as long as a linear merge (measured: 355 M parameters, three experts).
    Reference: Yu et al. 2024, arxiv.org/abs/2311.03099.
    """

    name: ClassVar[str] = "dare_linear"


class DareTies(_Drawn):
    """DARE with TIES' vote: of what is left of the task vectors, only what agrees with the elected sign is summed.

        theta = base + scale * sum_{k in A} c_k t_k
        t_k as in dare_linear
        A = the experts with sign(c_k t_k) = sign(sum_j c_j t_j), entry by entry

    When to use: large models whose experts contradict each other: fewer entries meet, so that fewer are voted down. It
    has no gradients, and the noise of ``dare_linear``.
    Reference: Yu et al. 2024, arxiv.org/abs/2311.03099; Yadav et al. 2023, arxiv.org/abs/2306.01708; mergekit's
    ``dare_ties``.
    """

    name: ClassVar[str] = "dare_ties"
