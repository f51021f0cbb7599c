"""What an operator is: the rule that merges tensors.

An operator turns its parameters' values into weights of a kernel, one column a tensor; whatever costs more than that
(sorted magnitudes, inner products, SVDs) it does in ``prepare``, which is repeated only when a structural value
changes.

Shape letters: K experts, S tensors ("segments" of the flat buffer), P padded elements of a checkpoint, B blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from evomerge.kernels.sources import Sources
from evomerge.records import Options, ParameterSpec

Values = Mapping[str, Tensor]
"""Parameter name -> (K, S) float64, or (1, S) for a parameter of the whole merge."""


class Operator(Protocol):
    """A merge rule over flat buffers."""

    name: ClassVar[str]
    options_type: ClassVar[type[Options]]
    reads_factors: ClassVar[bool]
    """Whether adapters may stay factored (``LowRank``); otherwise every expert arrives ``Dense``."""

    @property
    def options(self) -> Options:
        """What a campaign chose of ``options_type``."""

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """What can be set or searched; ``coefficient``, if there is one, is the first."""

    @property
    def differentiable(self) -> bool:
        """Whether the merge is linear in what ``weights`` returns; the operator is then a ``LinearOperator``."""

    @property
    def local(self) -> bool:
        """Whether each merged tensor depends on that tensor's values alone; otherwise all are rebuilt together."""

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> Any:
        """Return whatever is needed beyond the values; ``earlier`` is the state of the last call, or None.

        Nobody reads ``earlier`` afterwards: its memory may be taken over and written to.
        Raises: CandidateError if the merge is undefined; InputError if the sources do not suit the operator.
        """

    def weights(self, values: Values, state: Any) -> Tensor:
        """Return the kernel's weights (K+1, S), float64 on the CPU, differentiable in ``values``."""

    def merge(
        self, out_P: Tensor, sources: Sources, weights_KS: Tensor, state: Any, changed: Sequence[int] | None = None
    ) -> None:
        """Write the merged model to ``out_P``, or only the ``changed`` tensors of it."""


@runtime_checkable
class LinearOperator(Operator, Protocol):
    """A merge rule that is linear in its weights, so that one backward prices all of them."""

    def directions(self, sources: Sources, state: Any) -> Sources:
        """Return what the weights multiply: row 0 the base, row k the task vector of expert k of the result.

        A rule that weighs the task vectors themselves returns ``sources``. One that weighs a function of them, made
        in ``prepare`` (masked, projected, orthogonalized), returns ``sources`` with those in the experts' place: one
        a row of the weights, each ``Dense`` with ``is_task_vector`` or ``LowRank``. The merge is then ``lincomb`` of
        the result, and dL/dw[k, s] is ``task_vector_products`` of it.
        """
