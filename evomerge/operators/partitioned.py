"""Task arithmetic with several coefficients a matrix: its entries are drawn into classes, each with one of its own."""

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from evomerge.kernels.masked import block_keys
from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.linear import InParts
from evomerge.operators.masks import uniform_draws
from evomerge.operators.operator import Values
from evomerge.records import Options


class PartitionedOptions(Options):
    """classes: how many; seed: of the draws."""

    classes: int = Field(default=4, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**31)


class Partitioned(InParts):
    """Task arithmetic with several coefficients a matrix, whose entries are drawn into classes.

        theta = base + sum_k sum_p c_kp (m_p * tau_k)
        m_p = 1 in the entries of class p, else 0

    The classes of a matrix are drawn for each entry, as likely as each other, and shared by all experts; tensors that
    are no matrices are wholly of the first. All coefficients are searched as the campaign's space says of coefficients.
    What is merged lies in memory once a class and expert.
    When to use: with ``atlas`` or another descent on labels, where a coefficient a tensor is too few and memory holds
    ``classes`` times the experts. Not with searches by scores alone, whose dimensions it multiplies.
    Reference: Zhang et al. 2024, aTLAS, arxiv.org/abs/2407.02880, "aTLAS x K". The draws are DARE's hash of (seed, name
    of the tensor, place); the official code draws one mask for all tensors of a shape.
    """

    name: ClassVar[str] = "partitioned"

    options_type: ClassVar[type[Options]] = PartitionedOptions

    def __init__(self, options: PartitionedOptions | None = None) -> None:
        self.options = options or PartitionedOptions()
        super().__init__(self.options.classes, "class", default=0.3)

    def prepare(self, sources: Sources, values: Values, earlier: Sources | None) -> Sources:  # noqa: ARG002
        """Copy each expert once a class, with the base in the entries of the others."""
        copies = [[self._begun(sources, expert) for expert in sources.experts] for _ in self.parameters]
        keys_B = block_keys(sources, self.options.seed)[-1]
        for s, tensor in enumerate(sources.layout.tensors):
            for _, place in sources.chunks(s):
                classes_E = torch.zeros(place.stop - place.start, dtype=torch.int64, device=sources.device)
                if len(tensor.shape) == 2:
                    classes_E = (uniform_draws(keys_B, place) * self.options.classes).long()
                for number, of_class in enumerate(copies):
                    for copy, expert in zip(of_class, sources.experts, strict=True):
                        assert isinstance(expert, Dense)
                        mine_E = classes_E == number
                        copy.buffer_P[place] = torch.where(mine_E, expert.buffer_P[place], copy.buffer_P[place])
        return replace(sources, experts=tuple(copy for of_class in copies for copy in of_class))

    def directions(self, sources: Sources, state: Sources) -> Sources:  # noqa: ARG002
        """The copies, class by class."""
        return state

    @staticmethod
    def _begun(sources: Sources, expert: object) -> Dense:
        """Return a copy in which no entry is the expert's yet."""
        assert isinstance(expert, Dense)
        nothing_P = torch.zeros_like(expert.buffer_P) if expert.is_task_vector else sources.base_P.clone()
        return replace(expert, buffer_P=nothing_P)
