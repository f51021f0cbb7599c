"""The materializer: recipe -> merged model in memory, in place; and gradients of a loss in the coefficients.

Shape letters: K experts, G groups, S tensors, P padded elements, B blocks.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import CandidateError, CheckpointError
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.resident import ResidentModel, load_model, merged_tensors
from evomerge.operators.kernels import task_vector_products
from evomerge.operators.operator import Operator
from evomerge.records import Floats, Recipe


class Materializer:
    """Holds base, experts and the resident model, and rebuilds the model for each recipe.

    base and experts are flat buffers of the resident model's dtype: (K + 2) times the model's size in all.
    hashes maps each checkpoint's folder to the SHA-256 of its tensors.
    Raises: CheckpointError if a checkpoint holds a NaN or an infinity.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Checkpoint],
        *,
        dtype: str,
        device: str = "cpu",
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        progress(base.name)
        self.resident = ResidentModel(load_model(base, dtype), torch.device(device))
        self.layout, self.out_P = self.resident.layout, self.resident.out_P
        self.base_P = self.out_P.clone()
        self.experts_KP = self.out_P.new_zeros(len(experts), self.layout.num_padded)
        self.hashes: dict[str, str] = {}
        for checkpoint, buffer_P in zip((base, *experts), (self.base_P, *self.experts_KP), strict=True):
            if checkpoint is not base:
                progress(checkpoint.name)
                expert = load_model(checkpoint, dtype)
                self.layout.flatten(merged_tensors(expert), buffer_P)
            self._require_finite(checkpoint, buffer_P)
            self.hashes[str(checkpoint.folder)] = sha256(buffer_P)
        self._block_segment = self.layout.block_segment.to(device)
        self._built: tuple[Operator, Recipe] | None = None
        self._state: tuple[Operator, Mapping[str, Tensor], Any] | None = None

    def build(self, operator: Operator, recipe: Recipe) -> None:
        """Overwrite the resident model with the recipe's merge.

        Raises: CandidateError if the merge is undefined or not finite; EvoMergeError if the views are broken.
        """
        self.resident.check_views()
        if self._built == (operator, recipe):
            return
        self._built = None
        values = self._spread(recipe)
        weights_KB = operator.weights(values).to(self.out_P.device)[:, self._block_segment]
        operator.merge(self.out_P, self.base_P, self.experts_KP, weights_KB, self._prepare(operator, values))
        if flawed := self.layout.first_non_finite(self.out_P):
            raise CandidateError(f"the merged tensor {flawed} is not finite")
        self._built = operator, recipe

    def gradient(
        self, operator: Operator, recipe: Recipe, losses: Iterable[Callable[[], Tensor]]
    ) -> tuple[float, dict[str, Floats]]:
        """Return the sum of the losses and its gradient in the recipe's (K, G) numbers, by parameter.

        One backward a loss; each tensor's gradient is reduced to K + 1 inner products as soon as it is complete, and
        freed. dL/dw[k, s] = <dL/dtheta_s, tau_k,s>, then autograd through the operator's weights. Persistent buffers
        (running statistics) are merged too, but no gradient reaches them.
        """
        self.build(operator, recipe)
        values = {name: matrix.requires_grad_(True) for name, matrix in self._spread(recipe).items()}
        weights_KS = operator.weights(values)
        products_KS = torch.zeros_like(weights_KS)
        total = 0.0
        with _ReducedGradients(self, products_KS), torch.enable_grad():
            for loss in losses:
                value = loss()
                value.backward()
                total += float(value.detach())
        if not np.isfinite(total):
            raise CandidateError(f"the loss is {total}")
        weights_KS.backward(products_KS)
        group_of = _group_of(recipe)
        columns = torch.tensor([group_of[tensor.name] for tensor in self.layout.tensors])
        gradients = {}
        for name, matrix in values.items():
            gradient_KG = torch.zeros(len(matrix), len(recipe.groups), dtype=torch.float64)
            if matrix.grad is not None:
                gradient_KG.index_add_(1, columns, matrix.grad)
            gradients[name] = gradient_KG.numpy()
        return total, gradients

    def weights_hash(self) -> str:
        """SHA-256 of the merged tensors as they are: what is exported must have the same."""
        return sha256(self.out_P)

    def _spread(self, recipe: Recipe) -> dict[str, Tensor]:
        group_of = _group_of(recipe)
        return {
            name: self.layout.spread(group_of, torch.tensor(matrix, dtype=torch.float64))
            for name, matrix in recipe.values.items()
        }

    def _prepare(self, operator: Operator, values: Mapping[str, Tensor]) -> Any:
        """Repeat the operator's preparation only if a structural value changed."""
        structural = {spec.name: values[spec.name] for spec in operator.parameters if spec.structural}
        earlier = None
        if self._state and self._state[0] is operator:
            _, before, earlier = self._state
            if all(torch.equal(before[name], matrix) for name, matrix in structural.items()):
                return earlier
        state = operator.prepare(self.base_P, self.experts_KP, self.layout.segments, values, earlier)
        self._state = operator, structural, state
        return state

    def _require_finite(self, checkpoint: Checkpoint, buffer_P: Tensor) -> None:
        if flawed := self.layout.first_non_finite(buffer_P):
            raise CheckpointError(f"{checkpoint.name}: {flawed} holds a NaN or an infinity; the checkpoint is damaged")


class _ReducedGradients:
    """While entered, the resident parameters have gradients, which hooks reduce to products and free at once."""

    def __init__(self, materializer: Materializer, products_KS: Tensor) -> None:
        self.materializer, self.products_KS = materializer, products_KS
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        held = self.materializer
        segments = {tensor.name: s for s, tensor in enumerate(held.layout.tensors)}
        for name, parameter in held.resident.parameters.items():
            s = segments[name]
            segment = held.layout.segments[s]

            def reduce(parameter: Tensor, s: int = s, segment: slice = segment) -> None:
                assert parameter.grad is not None
                products = task_vector_products(
                    parameter.grad.reshape(-1), held.base_P[segment], held.experts_KP[:, segment]
                )
                self.products_KS[:, s] += products.cpu()
                parameter.grad = None

            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(reduce))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self.materializer.resident.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def _group_of(recipe: Recipe) -> dict[str, int]:
    return {name: g for g, names in enumerate(recipe.groups.values()) for name in names}


def sha256(buffer_P: Tensor) -> str:
    """Return the hash of a flat buffer's bytes."""
    return hashlib.sha256(buffer_P.cpu().view(torch.uint8).numpy().data).hexdigest()
