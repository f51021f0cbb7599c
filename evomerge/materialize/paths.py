"""Paths through the experts' layers: described as a recipe, and run on the experts' own memory.

Nothing is merged: every block of a path's model is a copy of one of the resident model's blocks in which the parameters
are an expert's, or a merge's that counts as one. Only the matrices that write into the residual stream are made anew,
where their gain is not 1, so that what is scored has the bits of what is exported.

Shape letters: K experts, L layers of a path, S tensors, P padded elements.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evomerge.errors import CandidateError, CheckpointError
from evomerge.kernels.layout import BLOCK
from evomerge.materialize.arrangement import arranged_config, listed_by_layer
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.resident import read_config
from evomerge.records import Floats, Layers, Recipe, TensorIndex
from evomerge.space.data_flow import Path, PathLayer, gains
from evomerge.space.groups import BLOCK_NUMBER, Groups, blocks

WRITERS = re.compile(  # the last matrices of attention and MLP, and their biases
    r"\.(?:o_proj|out_proj|c_proj|down_proj|wo|w2|fc2|fc_out|dense_4h_to_h|(?:self_)?attention\.dense|self_attn\.dense)"
    r"(?:\.weight|\.bias)?$"
)
LEADER = 0  # the expert whose embeddings, last norm and head a path has
PROBE = ((1, 2, 3, 4, 5, 6, 7),)
PROBE_ERROR = 0.05  # of the logits, relative; where norms come last they differ by a third and more


def describe(tensors: TensorIndex, num_experts: int, path: Path) -> tuple[Layers, Groups, dict[str, Floats]]:
    """Return a path as passthrough's layers (L, 1 + K), groups (one a tensor), and coefficient and scale by group.

    tensors are the base's. Beside the source of the first and of the last layer stands the leader, for what comes
    before and after the blocks.
    """
    rows = []
    for i, step in enumerate(path):
        sources = {step.expert, LEADER} if i in (0, len(path) - 1) else {step.expert}
        rows.append((None, *(step.layer if k in sources else None for k in range(num_experts))))
    before, by_block, after = _by_block([tensor.name for tensor in tensors])
    columns = [(name, LEADER, 1.0) for name in before]
    for i, step in enumerate(path):
        gain_of = {name: step.gain if WRITERS.search(name) else 1.0 for name in by_block[step.layer]}
        columns += [(_renumbered(name, i), step.expert, gain) for name, gain in gain_of.items()]
    columns += [(name, LEADER, 1.0) for name in after]
    names, experts, scales = zip(*columns, strict=True)
    coefficient_KS = (np.array(experts) == np.arange(num_experts)[:, None]).astype(np.float64)
    return tuple(rows), {name: (name,) for name in names}, {"coefficient": coefficient_KS, "scale": np.array([scales])}


def path_of(recipe: Recipe) -> Path:
    """Return the path that ``describe`` has written into a recipe."""
    assert recipe.layers is not None
    experts_S, [scales_S] = np.argmax(recipe.values["coefficient"], axis=0), recipe.values["scale"]
    steps: dict[int, PathLayer] = {}
    for name, block, k, gain in zip(recipe.groups, blocks(recipe.groups), experts_S.tolist(), scales_S, strict=True):
        if block is not None and WRITERS.search(name):
            number = recipe.layers[block[1]][1 + k]
            assert number is not None
            steps[block[1]] = PathLayer(k, number, gain)
    return tuple(steps[i] for i in range(len(recipe.layers)))


def path_depth(base: Checkpoint, tensors: TensorIndex) -> int:
    """Return the number of blocks. Raises: CheckpointError unless they are one tower of blocks of one shape."""
    shapes: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    for tensor, block in zip(tensors, blocks(tensor.name for tensor in tensors), strict=True):
        if block is not None:
            shapes.setdefault(block, {})[_renumbered(tensor.name, 0)] = tensor.shape
    towers = sorted({tower for tower, _ in shapes})
    if len(towers) != 1:
        raise CheckpointError(
            f"{base.name}: expected one tower of layers to lay paths through, found {', '.join(towers) or 'none'}; "
            "use another space"
        )
    for (tower, number), held in shapes.items():
        if held != shapes[tower, 0]:
            raise CheckpointError(
                f"{base.name}: expected layers of one shape to lay paths through, found layer {number} unlike layer 0; "
                "use another space"
            )
    return len(shapes)


class Paths:
    """The model that runs paths: like the resident one, on the memory of the experts, and built anew for each path.

    checkpoints are the base and the experts, experts_K the experts' tensors by name; free_P takes what is scaled, as
    far as it has room.
    Raises: CheckpointError if a scale on what layers read is no gain on what they write, as where norms come last, or
    if a configuration lists other kinds of layers than the base's.
    """

    def __init__(
        self,
        module: Any,
        checkpoints: Sequence[Checkpoint],
        experts_K: Sequence[Mapping[str, Tensor]],
        free_P: Tensor,
    ) -> None:
        self._experts_K, self._free_P = experts_K, free_P
        self._configs = [module.config, *map(read_config, checkpoints[1:])]
        for checkpoint, config in zip(checkpoints, self._configs, strict=True):
            for key, kinds in listed_by_layer(module.config).items():
                if getattr(config, key, None) != kinds:
                    raise CheckpointError(
                        f"{checkpoint.name}: {key} in config.json is not the base's; expected the same kinds of layers"
                    )
        before, self._names, after = _by_block(list(experts_K[LEADER]))
        match = BLOCK_NUMBER.search(self._names[0][0])
        assert match is not None
        self._tower = match.string[: match.start(1) - 1]
        # Neither the frame nor the blocks are ever run: what transformers hooks into a model stays in that path's.
        self._frame: Any = _copied(module)
        blocks_of_base: Any = self._frame.get_submodule(self._tower)
        self._blocks = list(blocks_of_base)
        self._frame.set_submodule(self._tower, nn.ModuleList())
        _replace(self._frame, {name: experts_K[LEADER][name] for name in (*before, *after)})
        self._require_gains(checkpoints[0])

    def build(self, path: Path) -> Any:
        """Return the model of a path; its scaled tensors are valid until the next one is built.

        Raises: CandidateError if a scaled tensor is not finite.
        """
        num_used = 0
        placed = []
        for i, step in enumerate(path):
            tensors = {}
            for name in self._names[step.layer]:
                tensor = self._experts_K[step.expert][name]
                if step.gain != 1.0 and WRITERS.search(name):
                    room_P = self._free_P[num_used : num_used + tensor.numel()]
                    num_used += -(-tensor.numel() // BLOCK) * BLOCK
                    tensor = _scaled(tensor, step.gain, room_P)
                    if not bool(tensor.isfinite().all()):
                        raise CandidateError(
                            f"{_renumbered(name, i)} times its gain of {step.gain:g} is not finite", "not finite"
                        )
                tensors[name.removeprefix(f"{self._tower}.{step.layer}.")] = tensor
            block = _copied(self._blocks[step.layer])
            _replace(block, tensors)
            for part in block.modules():
                if "layer_idx" in vars(part):  # where a cache has its keys and values
                    vars(part)["layer_idx"] = i
            placed.append(block)
        model: Any = _copied(self._frame)
        model.set_submodule(self._tower, nn.ModuleList(placed))
        rows = tuple(
            (None, *(step.layer if k == step.expert else None for k in range(len(self._experts_K)))) for step in path
        )
        config = arranged_config(self._configs, rows)
        for part in model.modules():
            if isinstance(vars(part).get("config"), type(config)):
                part.config = config
        return model

    def _require_gains(self, base: Checkpoint) -> None:
        """Compare the base's own layers with scaled inputs with those with gains: powers of two, which round nothing.

        The stream is twice as large after every other layer, and after the last. What is left between the two is the
        small number that norms add to the square of their input's size.
        """
        needs = (
            f"{base.name}: {type(self._frame).__name__} is not made for paths: expected a language model whose layers "
            "norm what they read, as in Llama, Qwen and GPT-2"
        )
        if self._frame.main_input_name != "input_ids":
            raise CheckpointError(f"{needs}, found one of {self._frame.main_input_name}; use another space")
        depth = len(self._blocks)
        sizes_L = np.where(np.arange(depth)[::-1] % 2, 1.0, 2.0)
        scales_L = sizes_L / np.array([1.0, *sizes_L[:-1]])
        logits = []
        for gains_L, inputs_L in ((gains(scales_L), np.ones(depth)), (np.ones(depth), scales_L)):
            model = self.build(tuple(PathLayer(LEADER, layer, float(gain)) for layer, gain in enumerate(gains_L)))
            logits.append(_logits(model, model.get_submodule(self._tower), inputs_L.tolist()))
        error = float((logits[0] - logits[1]).norm() / logits[1].norm())
        if not error < PROBE_ERROR:
            raise CheckpointError(
                f"{needs}; here, scales on what they read in place of gains on what they write change the logits by "
                f"{error:.0%}; use another space"
            )


def _logits(model: Any, tower: Any, scales: Sequence[float]) -> Tensor:
    """Return float32 logits of a few tokens, each block's input scaled."""
    hooks = [
        block.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale, *args[1:]))
        for block, scale in zip(tower, scales, strict=True)
    ]
    try:
        with torch.no_grad():
            output = model(input_ids=torch.tensor(PROBE, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    found: Tensor = output[0].float()
    return found


def _scaled(tensor: Tensor, gain: float, room_P: Tensor) -> Tensor:
    """Return a tensor times its gain, rounded as a merge is; in the room, if it is enough."""
    out = room_P.view(tensor.shape) if len(room_P) == tensor.numel() else torch.empty_like(tensor)
    return torch.mul(tensor, gain, out=out).add_(0.0)  # a merge is a sum, which has no negative zeros


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module and all modules in it, which has the same tensors; hooks are each copy's own."""
    twin = copy.copy(module)
    vars(twin).update({key: copy.copy(held) for key, held in vars(module).items() if isinstance(held, dict)})
    twin._modules.update({name: _copied(child) for name, child in module._modules.items() if child is not None})
    return twin


def _replace(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put other tensors in the place of parameters and buffers; what is tied stays tied."""
    held: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    places = {id(held[name]): name for name in tensors}
    new = {
        name: nn.Parameter(tensor, requires_grad=False) if isinstance(held[name], nn.Parameter) else tensor
        for name, tensor in tensors.items()
    }
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for leaf, tensor in table.items():
                if id(tensor) in places:
                    table[leaf] = new[places[id(tensor)]]  # type: ignore[assignment]


def _by_block(names: Sequence[str]) -> tuple[list[str], dict[int, list[str]], list[str]]:
    """Return the names of what comes before the blocks, of each block's tensors, and of what comes after."""
    before: list[str] = []
    by_block: dict[int, list[str]] = {}
    after: list[str] = []
    for name, block in zip(names, blocks(names), strict=True):
        if block is not None:
            by_block.setdefault(block[1], []).append(name)
        else:
            (after if by_block else before).append(name)
    return before, by_block, after


def _renumbered(name: str, number: int) -> str:
    """Return the name of the same tensor in another block."""
    match = BLOCK_NUMBER.search(name)
    assert match is not None
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"
