"""Linear combinations of checkpoints: model soups and task arithmetic."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.kernels.lincomb import lincomb
from evomerge.kernels.sources import Sources
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


class Lincomb:
    """What rules that are linear in their weights share: one kernel, and by default nothing to prepare."""

    reads_factors: ClassVar[bool] = True
    differentiable: bool = True
    local: bool = True

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> Any:  # noqa: ARG002
        """Nothing to prepare: base and experts are the cache."""
        return None

    def directions(self, sources: Sources, state: Any) -> Sources:  # noqa: ARG002
        """The weights multiply the base and the task vectors themselves."""
        return sources

    def merge(
        self, out_P: Tensor, sources: Sources, weights_KS: Tensor, state: Any, changed: Sequence[int] | None = None
    ) -> None:
        """Launch ``lincomb`` over the directions."""
        lincomb(out_P, self.directions(sources, state), weights_KS, changed)


class InParts(Lincomb):
    """Task arithmetic on parts of the task vectors, the same of all experts: each part has a coefficient of its own.

    part: what one is called, before its number. The coefficients are ``coefficient``, ``coefficient2``, ...; the
    directions are part by part, of each all experts.
    """

    reads_factors: ClassVar[bool] = False

    def __init__(self, num_parts: int, part: str, default: float) -> None:
        self.parameters: tuple[ParameterSpec, ...] = tuple(
            ParameterSpec(
                name=f"coefficient{'' if number == 1 else number}",
                meaning=f"weight of a task vector's entries of {part} {number}",
                default=default,
                low=-0.2,
                high=1.2,
            )
            for number in range(1, num_parts + 1)
        )

    def weights(self, values: Values, state: Any) -> Tensor:  # noqa: ARG002
        """The base once, then the experts' coefficients, part by part."""
        coefficients = [values[spec.name] for spec in self.parameters]
        return torch.cat([torch.ones_like(coefficients[0][:1]), *coefficients])


class TaskArithmetic(Lincomb):
    """Task arithmetic: the weighted sum of the task vectors on top of the base.

        theta = base + sum_k c_k tau_k

    0.3 is the paper's usual coefficient for eight tasks.
    When to use: first, whatever the experts. It is one pass over memory, has gradients and takes adapters as they are;
    if one number an expert is too few, ``space.groups`` gives more. Others are worth a try where experts contradict
    each other entry by entry, or where nothing is to be searched.
    Reference: Ilharco et al. 2023, arxiv.org/abs/2212.04089.
    """

    name: ClassVar[str] = "task_arithmetic"

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(name="coefficient", meaning="weight of a task vector", default=0.3, low=-0.2, high=1.2),
        )

    def weights(self, values: Values, state: None) -> Tensor:  # noqa: ARG002
        """The coefficients are the weights; the base counts once."""
        coefficients_KS = values["coefficient"]
        return torch.cat([torch.ones_like(coefficients_KS[:1]), coefficients_KS])


class LinearOptions(Options):
    """normalize: divide by the sum of the weights."""

    normalize: bool = True


class Linear(Lincomb):
    """The experts' weighted mean, a model soup; the base does not take part.

        theta = sum_k c_k expert_k / sum_k c_k

    ``normalize: false`` leaves the division out. Weights that sum to zero are a failed candidate here; other tools
    divide by them.
    When to use: experts of one task (seeds, settings or checkpoints of one training), whose mean is often better than
    each. Not to gather different skills: shares that sum to one leave a part of each, where ``task_arithmetic`` adds
    them up.
    Reference: Wortsman et al. 2022 (model soups), arxiv.org/abs/2203.05482.
    """

    name: ClassVar[str] = "linear"

    options_type: ClassVar[type[Options]] = LinearOptions

    def __init__(self, options: LinearOptions | None = None) -> None:
        self.options = options or LinearOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(name="coefficient", meaning="weight of an expert", default=1.0, low=0.0, high=1.0),
        )

    def weights(self, values: Values, state: None) -> Tensor:  # noqa: ARG002
        """In terms of task vectors: sum_k w_k expert_k = (sum_k w_k) base + sum_k w_k tau_k."""
        coefficients_KS = values["coefficient"]
        if not self.options.normalize:
            return torch.cat([coefficients_KS.sum(0, keepdim=True), coefficients_KS])
        return torch.cat([torch.ones_like(coefficients_KS[:1]), normalized(self.name, coefficients_KS)])


def normalized(operator: str, coefficients_KS: Tensor) -> Tensor:
    """Return the coefficients divided by their sum. Raises: CandidateError if a tensor's sum to zero."""
    sum_1S = coefficients_KS.sum(0, keepdim=True)
    if bool((sum_1S.abs() < 1e-8).any()):
        raise CandidateError(f"{operator}: the coefficients of a tensor sum to zero and cannot be normalized")
    return coefficients_KS / sum_1S
