"""Singular value decompositions of task vectors, and the directions that are made of them, tensor by tensor.

Shape letters: K experts, S tensors, P padded elements of a checkpoint; M rows and N columns of a matrix, R its rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evomerge.kernels.sources import Dense, LowRank, Sources
from evomerge.operators.linear import Lincomb
from evomerge.operators.operator import Values
from evomerge.records import ParameterSpec

# The singular values of a float32 matrix of known rank that ought to be zero were found at up to 0.4 sqrt(size) times
# eps times the largest (size 16 to 2,000); NumPy's usual size * eps would also drop what a task vector really has.
ROUNDING = 2 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True, eq=False)
class Svd:
    """A matrix as u @ diag(s) @ vh: u (M, R) and vh (R, N) orthonormal, s (R,) descending and positive."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def leading(self, num: int) -> "Svd":
        """Return the ``num`` largest triplets, or all if there are fewer."""
        return Svd(self.u[:, :num], self.s[:num], self.vh[:num])


def svd(matrix_MN: Tensor, size: Tensor | None = None) -> Svd:
    """Return the singular triplets that stand out of float32 rounding; a zero matrix has none.

    Below that the vectors are arbitrary: a rule that went by them would differ from machine to machine. size: what
    the rounding errors scale with; by default the largest singular value.
    """
    u, s, vh = torch.linalg.svd(matrix_MN, full_matrices=False)
    floor = ROUNDING * max(matrix_MN.shape) ** 0.5 * (s[:1] if size is None else size)
    return Svd(u, s, vh).leading(int((s > floor).sum()))


def polar(matrix_MN: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns (rows, if it is wide), the polar factor u @ vh.

    Where the columns are dependent that is not unique; then the isometry of the space that they do span.
    """
    found = svd(matrix_MN)
    return found.u @ found.vh


@dataclass(frozen=True, slots=True, eq=False)
class TaskVectors:
    """The task vectors of one tensor: each left @ core @ right, left and right orthonormal; or the cores alone.

    Checkpoints come as they are. A matrix of adapters comes in the small frame of the spaces that all of them span
    together: a rule made of SVDs, projections and sums gives the same there as outside, at a fraction of the cost.
    """

    cores: tuple[Tensor, ...]
    frame: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, sources: Sources, s: int) -> "TaskVectors":
        """Read tensor s of every expert, float32."""
        tensor, adapters = sources.layout.tensors[s], [one for one in sources.experts if isinstance(one, LowRank)]
        num_rows, num_columns = tensor.matrix
        held = [adapter.factors[s] for adapter in adapters if s in adapter.factors]
        whole = any(len(b) != num_rows for b, _ in held)  # a task vector that an adapter holds as one column
        if not are_adapters(sources) or len(tensor.shape) != 2 or whole:
            return cls(tuple(sources.task_vector(k, s) for k in range(sources.num_experts)))
        empty = torch.zeros(0, device=sources.device)
        left_MR = torch.linalg.qr(torch.cat([empty.view(num_rows, 0), *(b for b, _ in held)], dim=1)).Q
        right_RN = torch.linalg.qr(torch.cat([empty.view(0, num_columns), *(a for _, a in held)]).T).Q.T
        none = empty.new_zeros(left_MR.shape[1], right_RN.shape[0])
        pairs = [adapter.factors.get(s) for adapter in adapters]
        cores = [(left_MR.T @ pair[0]) @ (pair[1] @ right_RN.T) if pair else none for pair in pairs]
        return cls(tuple(cores), (left_MR, right_RN))


def are_adapters(sources: Sources) -> bool:
    """Whether every expert is an adapter, so that whatever is made of them stays of low rank."""
    return all(isinstance(expert, LowRank) for expert in sources.experts)


Product = tuple[Tensor, Tensor | None]
"""A direction of one tensor in its frame: left @ right, or left alone."""


class Directions:
    """What a merge adds to the base, to be filled in: ``sources`` with other task vectors.

    Of adapters they are adapters. Of checkpoints they are buffers of the base's dtype, one a direction. TSV-M's factors
    (2 float32 matrices, however many experts) would take less from 5 experts on in bfloat16, 3 in float32, but a matrix
    product a candidate instead of a weighted sum: 10 to 20 times as long for matrices of 2000 x 2000 on a CPU.
    """

    def __init__(self, sources: Sources, num: int) -> None:
        self._factors: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(num)]
        self._buffers: list[Tensor] = []
        if not are_adapters(sources):
            self._buffers = [torch.zeros_like(sources.base_P) for _ in range(num)]
        dense, low_rank = [Dense(held, is_task_vector=True) for held in self._buffers], map(LowRank, self._factors)
        self.sources = replace(sources, experts=tuple(dense or low_rank))

    def put(self, k: int, s: int, direction: Product, of: TaskVectors) -> None:
        """Hold tensor s of direction k, which was made of these task vectors."""
        left, right = direction
        if of.frame is None:
            whole_E = (left if right is None else left @ right).flatten()
            if self._buffers:
                self._buffers[k][self.sources.layout.segments[s]] = whole_E.to(self.sources.base_P.dtype)
                return
            left, right = whole_E[:, None], whole_E.new_ones(1, 1)
        else:
            if right is None:
                one = torch.eye(min(left.shape), device=left.device)
                left, right = (left, one) if left.shape[0] >= left.shape[1] else (one, left)
            left, right = of.frame[0] @ left, right @ of.frame[1]
        if bool(left.any()):
            self._factors[k][s] = (left, right)
        else:
            self._factors[k].pop(s, None)


@dataclass(frozen=True, slots=True, eq=False)
class FusedState:
    """The merged task vector, and the structural values of which it is made, (K or 1, S)."""

    directions: Directions
    values: Mapping[str, Tensor]


class Fused(Lincomb):
    """What rules share that make one merged task vector in ``prepare`` and leave a scale on it to the search.

    A changed structural value of a tensor makes that tensor anew and no other. Beyond the merged task vector (a
    buffer as large as an expert) it takes one tensor's temporaries.
    """

    parameters: tuple[ParameterSpec, ...]

    def fuse(self, task_vectors: Sequence[Tensor], numbers: Mapping[str, Tensor], is_matrix: bool) -> Product:
        """Return the merged task vector of one tensor; numbers: its structural values, (K,) or (1,)."""
        raise NotImplementedError

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> Any:
        """Merge the tensors whose structural values changed."""
        structural = {spec.name: values[spec.name] for spec in self.parameters if spec.structural}
        directions = earlier.directions if earlier else Directions(sources, 1)
        for s, tensor in enumerate(sources.layout.tensors):
            numbers = {name: matrix[:, s] for name, matrix in structural.items()}
            if earlier and all(torch.equal(earlier.values[name][:, s], held) for name, held in numbers.items()):
                continue
            vectors = TaskVectors.of(sources, s)
            directions.put(0, s, self.fuse(vectors.cores, numbers, len(tensor.shape) == 2), vectors)
        return FusedState(directions, structural)

    def directions(self, sources: Sources, state: FusedState) -> Sources:  # noqa: ARG002
        """The one merged task vector."""
        return state.directions.sources

    def weights(self, values: Values, state: Any) -> Tensor:  # noqa: ARG002
        """The scale weighs the merged task vector; the base counts once."""
        return torch.cat([torch.ones_like(values["scale"]), values["scale"]])
