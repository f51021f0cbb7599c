"""What an operator is: the rule that merges tensors.

An operator turns its parameters' values into weights of a kernel, one column a tensor; whatever costs more than that
(thresholds, later ranks or SVDs) it does once in ``prepare``, which is repeated only when a structural value changes.

Shape letters: K experts, S tensors ("segments" of the flat buffer), P padded elements of a checkpoint, B blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from evomerge.records import Options, ParameterSpec

Values = Mapping[str, Tensor]
"""Parameter name -> (K, S) float64, or (1, S) for a parameter of the whole merge."""


class Operator(Protocol):
    """A merge rule over flat buffers."""

    name: ClassVar[str]
    options_type: ClassVar[type[Options]]
    differentiable: ClassVar[bool]
    """Whether the merged tensors are linear in what ``weights`` returns, so that ``task_vector_products`` prices it."""

    @property
    def options(self) -> Options:
        """What a campaign chose of ``options_type``."""

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """What can be set or searched; ``coefficient`` is always the first."""

    def prepare(
        self, base_P: Tensor, experts_KP: Tensor, segments: Sequence[slice], values: Values, earlier: Any | None
    ) -> Any:
        """Return whatever the kernel needs beyond the weights; ``earlier`` is the state of the last call, or None."""

    def weights(self, values: Values) -> Tensor:
        """Return the kernel's weights (K+1, S), differentiable in ``values``."""

    def merge(self, out_P: Tensor, base_P: Tensor, experts_KP: Tensor, weights_KB: Tensor, state: Any) -> None:
        """Write the merged model to ``out_P``; ``weights_KB`` are the weights spread over the blocks."""
