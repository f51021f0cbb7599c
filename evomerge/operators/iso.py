"""Isotropic merging: the merged matrix's singular values are all made equal.

Shape letters: K experts, S tensors; M rows and N columns of a matrix, R a rank.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.operators.decompositions import Fused, Product, polar, svd
from evomerge.records import Options, ParameterSpec


def flatten_spectrum(task_vectors: Sequence[Tensor]) -> Product:
    """Return mean(sigma) U V^T of the sum's SVD, (M, R) @ (R, N): Iso-C."""
    found = svd(torch.stack(list(task_vectors)).sum(0))
    return found.u * found.s.mean(), found.vh


def common_and_task_spaces(task_vectors: Sequence[Tensor], fraction: float) -> Product:
    """Return the merged matrix (M, R) @ (R, N) of Iso-CTS: directions of the sum, and of what it lacks of each task.

    The fraction of the sum's directions that is common is rounded so that the rest divides by K; as many leading
    directions come from each task vector, once the common space is projected out of its columns.
    """
    whole, num_tasks = svd(torch.stack(list(task_vectors)).sum(0)), len(task_vectors)
    rank = len(whole.s)
    # round() may ask for more than there is: 2 directions, nothing common, 3 tasks
    num_own = min(round((rank - int(rank * fraction)) / num_tasks), rank // num_tasks)
    parts = [whole.leading(rank - num_own * num_tasks)]
    common = parts[0].u
    for vector in task_vectors:
        rest = vector - common @ (common.T @ vector)
        parts.append(svd(rest, size=torch.linalg.matrix_norm(vector)).leading(num_own))
    left = polar(torch.cat([part.u for part in parts], dim=1))
    right = polar(torch.cat([part.vh for part in parts]))
    return left * torch.cat([part.s for part in parts]).mean(), right


def _parameters(*further: ParameterSpec) -> tuple[ParameterSpec, ...]:
    return (
        ParameterSpec(
            name="coefficient",
            meaning="weight of a task vector in the sum; each change costs the SVDs anew",
            default=1.0,
            low=0.1,
            high=2.0,
            structural=True,
        ),
        ParameterSpec(
            name="scale", meaning="factor on the merged task vector", default=1.0, low=0.1, high=3.0, per_expert=False
        ),
        *further,
    )


class Iso(Fused):
    """What both rules share: coefficients within the sum, and a scale on the result."""

    def fuse(self, task_vectors: Sequence[Tensor], numbers: Mapping[str, Tensor], is_matrix: bool) -> Product:
        """Weigh, then merge."""
        weighted = [c * vector for c, vector in zip(numbers["coefficient"].tolist(), task_vectors, strict=True)]
        if not is_matrix:
            return torch.stack(weighted).mean(0), None
        return self.fuse_matrices(weighted, numbers)

    def fuse_matrices(self, task_vectors: Sequence[Tensor], numbers: Mapping[str, Tensor]) -> Product:
        """Return the merged matrix."""
        raise NotImplementedError


class IsoC(Iso):
    """Iso-C: the singular values of the summed task vectors are all made equal.

        theta = base + scale * mean(sigma) U V^T
        U sigma V^T = SVD of sum_k c_k tau_k

    Tensors that are no matrices are averaged. Preparing takes one SVD a matrix, and again for every new coefficient.
    The scale is cheap and has a gradient; the merge is not linear in a coefficient, which has none.
    When to use: many experts of different skills, where the strongest should not drown the others. Fix ``coefficient:
    1`` and search ``scale``; that cannot steer between abilities. Not for checkpoints of billions of parameters on a
    CPU, where SVDs take hours; of adapters they take milliseconds.
    Reference: Marczak et al. 2025, arxiv.org/abs/2502.04959.
    Departures: the directions are those that stand out of rounding (the official codes take min(M, N); a LoRA expert
    has few, and to lift the arbitrary rest to the mean would drown them), and every matrix takes part, CLIP's
    text_projection too.
    """

    name: ClassVar[str] = "iso_c"
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = _parameters()

    def fuse_matrices(self, task_vectors: Sequence[Tensor], numbers: Mapping[str, Tensor]) -> Product:  # noqa: ARG002
        """See ``flatten_spectrum``."""
        return flatten_spectrum(task_vectors)


class IsoCts(Iso):
    """Iso-CTS: as Iso-C, with some of the directions taken from each task.

        theta = base + scale * mean(sigma) U V^T
        U, V = nearest orthonormal to the leading directions of sum_k c_k tau_k,
               and of the rest of tau_1, ..., tau_K, side by side

    ``common_fraction`` of the directions is the sum's, rounded so that the others divide by K; the rest of a task
    vector is what the sum's directions leave of its columns; sigma are the singular values of all that are taken.
    Preparing takes K + 3 SVDs a matrix, and again for every new coefficient.
    When to use: as ``iso_c``, where some experts' own directions are lost in the sum; it takes K + 3 times as long to
    prepare.
    Reference: Marczak et al. 2025, arxiv.org/abs/2502.04959.
    """

    name: ClassVar[str] = "iso_cts"
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = _parameters(
            ParameterSpec(
                name="common_fraction",
                meaning="share of the directions that comes from the sum",
                default=0.8,
                low=0.0,
                high=1.0,
                minimum=0.0,
                maximum=1.0,
                per_expert=False,
                structural=True,
            )
        )

    def fuse_matrices(self, task_vectors: Sequence[Tensor], numbers: Mapping[str, Tensor]) -> Product:
        """See ``common_and_task_spaces``."""
        return common_and_task_spaces(task_vectors, float(numbers["common_fraction"]))
