"""The arrangement of layers: a model whose layer i is merged from layers of the sources' own numbers, at any depth.

What stands before the first block comes from the sources of the first layer, what stands after the last block from
those of the last layer.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CampaignError, CheckpointError
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.merge import Merge, Source
from evomerge.materialize.resident import (
    DTYPES,
    empty_model,
    merged_tensors,
    model_class,
    quiet_transformers,
    read_config,
    tensor_index,
)
from evomerge.records import Layers, TensorIndex
from evomerge.space.groups import BLOCK_NUMBER, blocks


@dataclass(frozen=True, slots=True)
class Output:
    """How a merged model differs from its base: it has another dtype, or layers of its own (L, 1 + K)."""

    dtype: str | None = None
    layers: Layers | None = None


LIKE_THE_BASE = Output()


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """What is merged into what.

    config is the output model's; tensors are what is merged, in its order. sources map, for the base and then each
    expert, a name of the output model to a name of that checkpoint, where the checkpoint is a source.
    """

    config: Any
    tensors: TensorIndex
    sources: tuple[Mapping[str, str], ...]

    def build(self, checkpoint: Checkpoint, base: nn.Module, dtype: str) -> nn.Module:
        """Return a model of the output's depth with the base's tensors; those that it has no source for are zero."""
        held = base.state_dict()
        shapes = empty_model(checkpoint, self.config).state_dict()
        state = {
            name: held[self.sources[0][name]]
            if name in self.sources[0]
            else torch.zeros(tensor.shape, dtype=DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in shapes.items()
        }
        with quiet_transformers():
            model: nn.Module = model_class(checkpoint).from_pretrained(
                None, config=self.config, state_dict=state, dtype=DTYPES[dtype]
            )
        if hasattr(base, "generation_config"):
            model.generation_config = base.generation_config
        return model.eval()

    def expert(self, k: int, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return expert k's tensors under the output's names; the base's where it has none, so that nothing moves."""
        source = self.sources[1 + k]
        names = [tensor.name for tensor in self.tensors]
        return {name: tensors[source[name]] if name in source else base[name] for name in names}


def arrange(sources: Sequence[Source], layers: Layers) -> Arrangement:
    """Arrange the layers of a base (the first of the sources) and its experts.

    Shapes: layers (L, 1 + K). Raises: CampaignError for a layer that a checkpoint does not have; CheckpointError if the
    model cannot be given another depth, or sources of one tensor differ in shape.
    """
    whole = []
    for source in sources:
        if isinstance(source, Adapter):
            raise CampaignError(f"{source.name}: an adapter fits its base's layers only; merge it with the base first")
        whole.append(source.form if isinstance(source, Merge) else source)
    models = [empty_model(checkpoint) for checkpoint in whole]
    for k in reversed(range(len(whole))):  # the base may be one of the experts, which a user knows by that name
        depth = _depth(whole[k], models[k])
        for i, row in enumerate(layers):
            number = row[k]
            if number is not None and not 0 <= number < depth:
                raise CampaignError(f"layer {i}: {whole[k].name} has layers 0 to {depth - 1}, not {number}")
    config = arranged_config([read_config(checkpoint) for checkpoint in whole], layers)
    out = empty_model(whole[0], config)
    names = tuple(_source_names(list(out.state_dict()), layers, k) for k in range(len(whole)))
    for checkpoint, model, of_it in zip(whole, models, names, strict=True):
        _require_shapes(checkpoint, model, of_it, out)
    return Arrangement(config, tensor_index(out), names)


def _require_shapes(checkpoint: Checkpoint, model: nn.Module, source: Mapping[str, str], out: nn.Module) -> None:
    held = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in out.state_dict().items():
        if name in source and held.get(source[name]) != list(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.name}: {source[name]}: expected shape {list(tensor.shape)} to take the place of {name}, "
                f"found {held.get(source[name], 'no such tensor')}; layers that are merged must be of one kind"
            )


def _depth(checkpoint: Checkpoint, model: nn.Module) -> int:
    found = [block for block in blocks(merged_tensors(model)) if block]
    towers = sorted({tower for tower, _ in found})
    if len(towers) != 1:
        raise CheckpointError(
            f"{checkpoint.name}: layers can be arranged in a model with one tower of blocks, found "
            f"{', '.join(towers) or 'none'}; merge it without layers"
        )
    return max(number for _, number in found) + 1


def _source_names(names: Sequence[str], layers: Layers, k: int) -> dict[str, str]:
    """Return the output's name -> checkpoint k's name, where it is a source."""
    sources = {}
    for name, row in zip(names, rows_of(names, layers), strict=True):
        if row[k] is not None:
            match = BLOCK_NUMBER.search(name)
            sources[name] = f"{name[: match.start(1)]}{row[k]}{name[match.end(1) :]}" if match else name
    return sources


def rows_of(names: Sequence[str], layers: Layers) -> list[tuple[int | None, ...]]:
    """Return which layers each of the output's tensors is made of; outside the blocks only who is None matters."""
    rows, seen_block = [], False
    for block in blocks(names):
        seen_block = seen_block or block is not None
        rows.append(layers[block[1] if block else -1 if seen_block else 0])
    return rows


def num_layers(checkpoint: Checkpoint) -> int:
    """Return the number of blocks. Raises: CheckpointError if they are not one tower."""
    return _depth(checkpoint, empty_model(checkpoint))


def arranged_config(configs: Sequence[Any], layers: Layers) -> Any:
    """Return the base's configuration with the new number of layers; what it lists by layer follows the sources.

    configs are the base's and the experts'. Raises: CampaignError if the base's does not say how many layers it has.
    """
    config = copy.deepcopy(configs[0])
    if not hasattr(config, "num_hidden_layers"):
        raise CampaignError(f"layers: {type(config).__name__} does not say num_hidden_layers, which is to change")
    # A layer is of the kind that its first source has.
    leaders = [next((k, row[k]) for k in range(len(row)) if row[k] is not None) for row in layers]
    by_layer = {key: [getattr(configs[k], key)[j] for k, j in leaders] for key in listed_by_layer(config)}
    config.num_hidden_layers = len(layers)
    for key, value in by_layer.items():
        setattr(config, key, value)
    return config


def listed_by_layer(config: Any) -> dict[str, list[Any]]:
    """Return what a configuration lists by layer, such as the kinds of attention."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers
    }
