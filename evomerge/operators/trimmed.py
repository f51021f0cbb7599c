"""What the rules share that trim each task vector and combine what is left.

Shape letters: K experts, S tensors, P padded elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from evomerge.kernels.masked import Trims, kept_entries, masked_consensus
from evomerge.kernels.sources import Sources
from evomerge.kernels.tiles import Vote
from evomerge.operators.linear import normalized
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec

Cache = TypeVar("Cache")


@dataclass(frozen=True, slots=True, eq=False)
class TrimState(Generic[Cache]):
    """cache: what is made once, whatever the densities. trims: of the present ones."""

    cache: Cache
    trims: Trims


class TrimmedOptions(Options):
    """normalize: divide by the summed coefficients; where signs are elected, by those of the entries that agree."""

    normalize: bool = False


class Trimmed:
    """theta = base + scale * the weighted sum of the trimmed task vectors' entries that agree with the elected sign.

    The sign is that of the sum of the weighted entries; zero is positive.
    """

    reads_factors: ClassVar[bool] = False
    differentiable: bool = False  # the elected sign jumps with the coefficients
    local: bool = True

    options: TrimmedOptions

    @property
    def vote(self) -> Vote:
        """How what is left is combined."""
        return Vote(elect="weighted", divide="weights" if self.options.normalize else "no")

    def weights(self, values: Values, state: Any) -> Tensor:  # noqa: ARG002
        """Row 0 scales the consensus, the others weigh the task vectors."""
        return torch.cat([values["scale"], values["coefficient"]])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: TrimState[Any],
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``masked_consensus``."""
        masked_consensus(out_P, sources, weights_KS, state.trims, self.vote, changed)


class LinearTrimmed(Trimmed):
    """A rule whose vote the coefficients do not touch, so that the merge is linear in them.

    theta = base + scale * sum_k c_k d_k, d_k what is left of tau_k, divided by the number of what agrees if so voted.
    """

    differentiable: bool = True

    def weights(self, values: Values, state: Any) -> Tensor:  # noqa: ARG002
        """The base counts once; the others weigh what is left of the task vectors."""
        return torch.cat([torch.ones_like(values["scale"]), values["scale"] * values["coefficient"]])

    def directions(self, sources: Sources, state: TrimState[Any]) -> Sources:
        """What is left of the task vectors: buffers as large as all experts together, made for gradients alone."""
        return replace(sources, experts=kept_entries(sources, state.trims, self.vote))


class TrimmedSum(LinearTrimmed):
    """theta = base + scale * sum_k c_k trimmed tau_k, divided by sum_k c_k if ``normalize``."""

    name: ClassVar[str]

    @property
    def vote(self) -> Vote:
        """None: all entries are summed."""
        return Vote()

    def weights(self, values: Values, state: Any) -> Tensor:
        """Normalized, if so asked."""
        coefficients_KS = values["coefficient"]
        if self.options.normalize:
            coefficients_KS = normalized(self.name, coefficients_KS)
        return super().weights({**values, "coefficient": coefficients_KS}, state)


def coefficient(default: float, low: float, high: float, vote: Vote) -> ParameterSpec:
    """Return the spec of the task vectors' weights.

    They must be positive where what agrees is divided by its weights: a sum of both signs can nearly cancel and blow
    an entry up.
    """
    return ParameterSpec(
        name="coefficient",
        meaning="weight of a task vector",
        default=default,
        low=low,
        high=high,
        minimum=0.0 if vote.divide == "weights" else float("-inf"),
    )


def density(what: str, default: float, low: float, high: float = 1.0, margin: float = 0.0) -> ParameterSpec:
    """Return the spec of the kept fraction, defined from ``margin`` to 1 - ``margin``."""
    return ParameterSpec(
        name="density",
        meaning=f"fraction of each task vector that is kept, {what}",
        default=min(max(default, margin), 1 - margin),
        low=max(low, margin),
        high=min(high, 1 - margin),
        minimum=margin,
        maximum=1 - margin,
        structural=True,
    )


SCALE = ParameterSpec(
    name="scale", meaning="factor on the merged task vector", default=1.0, low=0.3, high=3.0, per_expert=False
)
