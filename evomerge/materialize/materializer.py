"""The materializer: recipe -> merged model in memory, in place; and gradients of a loss in the coefficients.

Shape letters: K experts, G groups, S tensors, P padded elements, B blocks.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CandidateError, CheckpointError, InputError
from evomerge.kernels.launch import path
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.lincomb import task_vector_products
from evomerge.kernels.sources import Dense, Expert, LowRank, Sources
from evomerge.materialize.adapter import Adapter, factors_hash, load_adapter
from evomerge.materialize.arrangement import LIKE_THE_BASE, Output, arrange
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.merge import Merge, Source
from evomerge.materialize.paths import Paths, path_of
from evomerge.materialize.residence import ON_THE_CPU, Place, to_int8
from evomerge.materialize.resident import DTYPES, ResidentModel, load_model, merged_tensors
from evomerge.materialize.sharing import Shared, base_of, sources_of
from evomerge.materialize.vocabulary import vocabulary_tensors
from evomerge.operators.operator import LinearOperator, Operator
from evomerge.records import Floats, Recipe


class Materializer:
    """Holds base, experts and the resident model, and rebuilds the model for each recipe.

    base and experts are flat buffers of ``dtype``: (K + 2) times the model's size in all, but see ``residence.py``.
    ``out_P`` is where merges are written: the resident model's own memory, or the host's, which ships them there.
    Adapters are held as their factors; the first operator that does not read factors makes a buffer of each, too. An
    expert that is a merge is made first, and held like a checkpoint.
    hashes maps each checkpoint's folder to the SHA-256 of its tensors. shared: base and experts as another process of
    this machine has read them; what was sound there is not looked at again.
    Raises: CheckpointError if a checkpoint holds a NaN or an infinity; InputError if the device has too little memory.
    """

    def __init__(  # noqa: PLR0913  (named at every call)
        self,
        base: Checkpoint,
        experts: Sequence[Source],
        *,
        dtype: str,
        output: Output = LIKE_THE_BASE,
        place: Place = ON_THE_CPU,
        progress: Callable[[str], None] = lambda _: None,
        shared: Shared | None = None,
    ) -> None:
        self.hashes: dict[str, str] = {}
        # Before anything else is held: what a merge is made of is given up before the rest comes.
        self._merged = {
            expert.name: self._merge(expert, dtype, place, progress) for expert in experts if isinstance(expert, Merge)
        }
        progress(base.name)
        self._arrangement = arrange((base, *experts), output.layers) if output.layers else None
        out_dtype = output.dtype or dtype
        module = self._load_base(base, out_dtype)
        num_elements = sum(tensor.numel() for tensor in merged_tensors(module).values())
        element_bytes = max(DTYPES[dtype].itemsize, DTYPES[out_dtype].itemsize)
        settled = place.choose(place.needed_bytes(num_elements, element_bytes, experts))
        self.residence = settled.residence
        self.resident = ResidentModel(module, settled.rooms)
        self.layout, self.out_P = self.resident.layout, self.resident.buffers[0]
        if self.residence == "host":
            # Pinned, it is shipped at the bus's full speed.
            self.out_P = torch.empty(self.layout.num_padded, dtype=self.out_P.dtype, pin_memory=self.out_P.is_cuda)
            for here, piece_P in self.resident.pieces():
                self.out_P[here].copy_(piece_P)
        self._made_of: tuple[Source, ...] = (base, *experts)
        if shared is None:
            self.sources = self._load(dtype, out_dtype, progress)
        else:
            self.base_P = base_of(shared, DTYPES[dtype]).to(self.out_P.device)
            self.hashes |= shared.hashes
            self.adopt(shared)
        self._merged.clear()
        self._densified: Sources | None = None
        self._built: tuple[Operator, Recipe, Mapping[str, Tensor]] | None = None
        self._keeps_merge = place.keeps_merge
        # At once, while the model is the base: checkpoints that no path can be laid through are found out now.
        self._paths: Paths | None = self._open_paths() if place.keeps_merge else None
        self.module = self.resident.module
        self._directions: tuple[Operator, Any, Sources] | None = None  # of the operator and state of a descent
        self._states: dict[Operator, tuple[Mapping[str, Tensor], Any]] = {}

    def build(self, operator: Operator, recipe: Recipe) -> None:
        """Overwrite the resident model with the recipe's merge, or lay a path; ``module`` is then its model.

        A path through a merge takes the one that was built last.
        Raises: CandidateError if the merge is undefined or not finite; EvoMergeError if the views are broken;
        InputError if the recipe is a path and these are no checkpoints to lay one through.
        """
        self._directions = None  # as large as all experts, where an operator makes them for gradients alone
        self._build(operator, recipe)

    def _build(self, operator: Operator, recipe: Recipe) -> None:
        assert recipe.int8 == (self.residence == "int8")
        self.resident.check_views()
        if recipe.layers and self._arrangement is None:
            if self._keeps_merge:
                assert self._built is not None
                assert recipe.merges == [self._built[1]]
            else:
                self._built = None  # what is scaled lies where merges do
            self._paths = self._paths or self._open_paths()
            self.module = self._paths.build(path_of(recipe))
            return
        self.module = self.resident.module
        if self._built and self._built[:2] == (operator, recipe):
            return
        values = self._spread(recipe)
        changed = self._changed(operator, values)
        self._built = None
        state = self._prepare(operator, values)
        operator.merge(self.out_P, self._sources_of(operator), operator.weights(values, state), state, changed)
        if flawed := self.layout.first_non_finite(self.out_P, changed):
            raise CandidateError(f"the merged tensor {flawed} is not finite", "not finite")
        if self.residence == "host":
            self.resident.ship(self.out_P, changed)
        self._built = operator, recipe, values

    def gradients(
        self, operator: Operator, recipe: Recipe, losses: Iterable[Callable[[], Tensor]]
    ) -> list[tuple[float, dict[str, Floats]]]:
        """Return each loss and its gradient in the recipe's (K, G) numbers, by parameter.

        One backward a loss; each tensor's gradient is reduced to K + 1 inner products as soon as it is complete, and
        freed. dL/dw[k, s] = <dL/dtheta_s, d_k,s>, d_k the operator's directions (by default the task vectors), then
        autograd through its weights. Persistent buffers (running statistics) are merged too, but no gradient reaches
        them.
        """
        assert isinstance(operator, LinearOperator)
        self._build(operator, recipe)
        values = {name: matrix.requires_grad_(True) for name, matrix in self._spread(recipe).items()}
        state = self._prepare(operator, values)
        weights_KS = operator.weights(values, state)
        products_KS = torch.zeros_like(weights_KS)
        if self._directions is None or self._directions[0] is not operator or self._directions[1] is not state:
            self._directions = operator, state, operator.directions(self._sources_of(operator), state)
        group_of = _group_of(recipe)
        columns = torch.tensor([group_of[tensor.name] for tensor in self.layout.tensors])
        found = []
        with _ReducedGradients(self, self._directions[2], products_KS), torch.enable_grad():
            for loss in losses:
                products_KS.zero_()
                value = loss()
                value.backward()
                number = float(value.detach())
                if not math.isfinite(number):
                    raise CandidateError(f"the loss is {number}", "not finite")
                slopes = torch.autograd.grad(
                    weights_KS, list(values.values()), products_KS, retain_graph=True, allow_unused=True
                )
                gradients = {}
                for (name, matrix), slope_KS in zip(values.items(), slopes, strict=True):
                    gradient_KG = torch.zeros(len(matrix), len(recipe.groups), dtype=torch.float64)
                    if slope_KS is not None:
                        gradient_KG.index_add_(1, columns, slope_KS)
                    gradients[name] = gradient_KG.numpy()
                found.append((number, gradients))
        return found

    def adopt(self, shared: Shared) -> None:
        """Read base and experts from shared memory; a copy of this process's own goes."""
        self._paths = None  # they lie where this process has read the experts
        adapters = [self._load_adapter(held) if isinstance(held, Adapter) else None for held in self._made_of[1:]]
        if self.base_P.device.type == "cpu":
            self.base_P = base_of(shared, self.base_P.dtype)
        int8 = self.residence == "int8"
        self.sources = sources_of(shared, self.layout, self.base_P, adapters, int8=int8)

    @property
    def kernels(self) -> str:
        """How merges are computed, in words."""
        return path(self.sources.device, self.layout.num_padded)

    def weights_hash(self) -> str:
        """SHA-256 of the tensors of ``module`` as they are: what is exported must have the same."""
        if self.module is not self.resident.module:
            return tensors_hash(self.module)
        return sha256(*(piece_P for _, piece_P in self.resident.pieces()))

    def parts(self, operator: Operator, recipe: Recipe) -> tuple[Sources, Tensor, Any]:
        """Return what a recipe's merge is made of: the sources as the operator reads them, its weights, its state."""
        values = self._spread(recipe)
        state = self._prepare(operator, values)
        return self._sources_of(operator), operator.weights(values, state), state

    def let_go(self) -> None:
        """Give the memory of base and experts back: the model stays as it is, and nothing can be built any more."""
        self._built = self._densified = self._directions = self._paths = None
        self._states.clear()
        self.base_P = self.out_P = self.out_P.new_empty(0)
        self.sources = replace(self.sources, base_P=self.base_P, experts=())

    def _spread(self, recipe: Recipe) -> dict[str, Tensor]:
        group_of = _group_of(recipe)
        return {
            name: self.layout.spread(group_of, torch.tensor(matrix, dtype=torch.float64))
            for name, matrix in recipe.values.items()
        }

    def _changed(self, operator: Operator, values: Mapping[str, Tensor]) -> list[int] | None:
        """Return the tensors whose values differ from what the model holds, or None for all."""
        if self._built is None or self._built[0] is not operator or not operator.local:
            return None
        before = self._built[2]
        differs_S = torch.zeros(len(self.layout.tensors), dtype=torch.bool)
        for name, matrix in values.items():
            differs_S |= (matrix != before[name]).any(0)
        return [int(s) for s in differs_S.nonzero()]

    def _prepare(self, operator: Operator, values: Mapping[str, Tensor]) -> Any:
        """Repeat the operator's preparation only if a structural value changed."""
        structural = {spec.name: values[spec.name] for spec in operator.parameters if spec.structural}
        # Taken out, since prepare may overwrite it: a preparation that fails midway leaves nothing half-made behind.
        held = self._states.pop(operator, None)
        if held and all(torch.equal(held[0][name], matrix) for name, matrix in structural.items()):
            state = held[1]
        else:
            state = operator.prepare(self._sources_of(operator), values, held[1] if held else None)
        self._states[operator] = structural, state
        return state

    def _sources_of(self, operator: Operator) -> Sources:
        """Return the sources as the operator reads them; dense adapters are made when first needed, and kept."""
        if operator.reads_factors:
            return self.sources
        if self._densified is None:
            # One after the other: in 8 bits they never lie side by side in the model's dtype.
            alone = (replace(self.sources, experts=(expert,)).densified() for expert in self.sources.experts)
            self._densified = replace(self.sources, experts=tuple(self._held(one.experts[0]) for one in alone))
        return self._densified

    def _held(self, expert: Expert) -> Expert:
        """Return an expert as the residence has it."""
        if self.residence != "int8" or not isinstance(expert, Dense) or expert.scales_B is not None:
            return expert
        return to_int8(expert, self.base_P)

    def _open_paths(self) -> Paths:
        """Raises: InputError if the experts do not lie whole where the model runs."""
        if len(self.resident.shares) > 1:
            devices = ", ".join(str(share.device) for share in self.resident.shares)
            raise InputError(
                f"device: paths run on the experts' own tensors, on one device, but the model is spread over {devices}"
                "; expected one that holds base and experts"
            )
        if self.residence != "resident":
            raise InputError(
                f"residence: {self.residence}: paths run on the experts' own tensors; expected residence: resident"
            )
        checkpoints = [held for held in self._made_of if isinstance(held, Checkpoint)]
        buffers = [expert.buffer_P for expert in self.sources.experts if isinstance(expert, Dense)]
        room_P = self.out_P
        if self._keeps_merge:
            checkpoints, buffers = [checkpoints[0], *checkpoints], [self.out_P, *buffers]
            room_P = torch.empty_like(self.out_P)
        return Paths(self.resident.module, checkpoints, [self.layout.views(buffer_P) for buffer_P in buffers], room_P)

    def _load(self, dtype: str, out_dtype: str, progress: Callable[[str], None]) -> Sources:
        """Read base and experts from their files."""
        base, *experts = self._made_of
        assert isinstance(base, Checkpoint)
        self.base_P = self.out_P.clone()
        if out_dtype != dtype:
            self.base_P = self._flat(merged_tensors(self._load_base(base, dtype))).to(self.base_P.device)
        self._require_finite(base, self.base_P)
        self.hashes.setdefault(str(base.folder), sha256(self.base_P))
        held: list[Expert] = []
        for k, expert in enumerate(experts):
            progress(expert.name)
            held.append(
                self._load_adapter(expert) if isinstance(expert, Adapter) else self._load_dense(k, expert, dtype)
            )
        return Sources(self.layout, self.base_P, tuple(held))

    def _load_adapter(self, adapter: Adapter) -> LowRank:
        factors = load_adapter(adapter, self.layout, self.base_P)
        self.hashes[str(adapter.folder)] = factors_hash(factors, self.layout)
        return factors

    def _load_base(self, base: Checkpoint, dtype: str) -> nn.Module:
        """Load the base, its layers arranged as the output's."""
        model = load_model(base, dtype)
        if self._arrangement is None:
            return model
        self.hashes[str(base.folder)] = tensors_hash(model)
        return self._arrangement.build(base, model, dtype)

    def _load_dense(self, k: int, expert: Checkpoint | Merge, dtype: str) -> Expert:
        """Load expert k's tensors, its vocabulary in the base's order and its layers arranged as the output's."""
        named = self._merged[expert.name] if isinstance(expert, Merge) else self._read(expert, dtype)
        if self._arrangement is not None:
            named = self._arrangement.expert(k, named, self.layout.views(self.base_P))
        buffer_P = self._flat(named)
        self._require_finite(expert, buffer_P)
        if isinstance(expert, Checkpoint):
            self.hashes.setdefault(str(expert.folder), sha256(buffer_P))
        return self._held(Dense(buffer_P))

    def _read(self, checkpoint: Checkpoint, dtype: str) -> dict[str, Tensor]:
        model = load_model(checkpoint, dtype)
        named = merged_tensors(model)
        if checkpoint.alignment is not None:
            base = self.layout.views(self.base_P)
            for name in vocabulary_tensors(self.resident.module):
                named[name] = checkpoint.alignment.apply(named[name], base[name].cpu())
        if self._arrangement is not None:
            self.hashes[str(checkpoint.folder)] = tensors_hash(model)
        return named

    def _merge(self, merge: Merge, dtype: str, place: Place, progress: Callable[[str], None]) -> dict[str, Tensor]:
        """Return the tensors of a merge, on the CPU; made on the device, where they are what they are."""
        made = Materializer(
            merge.base,
            merge.experts,
            dtype=dtype,
            place=replace(place, factored=merge.operator.reads_factors),
            progress=progress,
        )
        made.build(merge.operator, merge.recipe)
        made.let_go()
        self.hashes |= made.hashes
        return {name: tensor.detach().cpu() for name, tensor in merged_tensors(made.module).items()}

    def _flat(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return tensors in a buffer of their own dtype, where the residence has them; on the CPU if that is 8 bits."""
        device = "cpu" if self.residence == "int8" else self.out_P.device
        buffer_P = torch.zeros(self.layout.num_padded, dtype=next(iter(named.values())).dtype, device=device)
        self.layout.flatten(named, buffer_P)
        return buffer_P

    def _require_finite(self, source: Checkpoint | Merge, buffer_P: Tensor) -> None:
        if flawed := self.layout.first_non_finite(buffer_P):
            raise CheckpointError(f"{source.name}: {flawed} holds a NaN or an infinity; the checkpoint is damaged")


class _ReducedGradients:
    """While entered, the resident parameters have gradients, which hooks reduce to products and free at once."""

    def __init__(self, materializer: Materializer, directions: Sources, products_KS: Tensor) -> None:
        self.materializer, self.directions, self.products_KS = materializer, directions, products_KS
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        held = self.materializer
        segments = {tensor.name: s for s, tensor in enumerate(held.layout.tensors)}
        for name, parameter in held.resident.parameters.items():

            def reduce(parameter: Tensor, s: int = segments[name]) -> None:
                assert parameter.grad is not None
                gradient_E = parameter.grad.reshape(-1).to(self.directions.device)
                products = task_vector_products(gradient_E, self.directions, s)
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


def tensors_hash(model: nn.Module) -> str:
    """Return the hash that a model's tensors have in the flat layout of its own; no buffer is made."""
    found = hashlib.sha256()
    for tensor in merged_tensors(model).values():
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        found.update(bytes(-tensor.numel() % BLOCK * tensor.element_size()))
    return found.hexdigest()


def sha256(*pieces_P: Tensor) -> str:
    """Return the hash of a flat buffer's bytes, of which pieces may lie on several devices."""
    found = hashlib.sha256()
    for piece_P in pieces_P:
        found.update(piece_P.cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()
