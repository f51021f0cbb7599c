"""The resident model: a transformers model whose parameters are views of flat buffers that candidates overwrite.

Names and shapes are transformers' own (its loader converts old file names), so that every architecture it can load can
be merged. A dtype-changing ``.to``, ``resize_token_embeddings`` or a deepcopy would break the views: ``check_views``
notices.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CheckpointError, EvoMergeError
from evomerge.kernels.layout import BLOCK, Layout
from evomerge.materialize.checkpoint import Checkpoint, still_there
from evomerge.materialize.spread import Room, settle, spread
from evomerge.records import TensorIndex, TensorInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and advice while it loads or saves; ours say what happens."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_class(checkpoint: Checkpoint) -> Any:
    """Return the class that the checkpoint's configuration names. Raises: CheckpointError if transformers has none."""
    import transformers

    names = checkpoint.config.get("architectures") or ["AutoModel"]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.name}: config.json names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have (code from the hub is not run)"
        )
    return found


def read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of a checkpoint. Raises: CheckpointError if it makes none."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # a configuration class raises whatever its values lead to
        raise _makes_no_model(checkpoint, error) from error


def empty_model(checkpoint: Checkpoint, config: Any | None = None) -> nn.Module:
    """Build the model without memory (meta device): names, shapes and ties only; config: another than its own.

    Raises: CheckpointError if the configuration makes no model of this transformers.
    """
    architecture = model_class(checkpoint)
    config = config or read_config(checkpoint)
    with quiet_transformers(), torch.device("meta"):
        try:
            model: nn.Module = architecture(config)
        except Exception as error:  # as does a model's class
            raise _makes_no_model(checkpoint, error) from error
    return model


def _makes_no_model(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{checkpoint.name}: {checkpoint.folder / 'config.json'} makes no model ({reason})")


def tied_names(model: nn.Module) -> frozenset[str]:
    """Names that share the storage of another parameter and may or may not be in a checkpoint's files."""
    return frozenset(getattr(model, "all_tied_weights_keys", None) or {})


def load_model(checkpoint: Checkpoint, dtype: str) -> nn.Module:
    """Load a checkpoint on the CPU; every tensor must be found and used. Raises: CheckpointError otherwise."""
    with quiet_transformers(), still_there(checkpoint.name, checkpoint.folder):
        model, report = model_class(checkpoint).from_pretrained(
            checkpoint.folder,
            dtype=DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
            output_loading_info=True,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(what) or ())):
            raise CheckpointError(
                f"{checkpoint.name}: {what.split('_', maxsplit=1)[0]} tensors for {type(model).__name__}: "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; save the checkpoint again with "
                "save_pretrained of that class"
            )
    loaded: nn.Module = model.eval()
    return loaded


def load_processor(checkpoint: Checkpoint) -> Any | None:
    """Return the checkpoint's tokenizer or processor, by the files that lie in its folder; None if there are none."""
    from transformers import AutoProcessor

    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
    if not any((checkpoint.folder / name).is_file() for name in names):
        return None
    with quiet_transformers():
        return AutoProcessor.from_pretrained(checkpoint.folder, local_files_only=True)


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent floating buffer, tied ones once, in the model's order.

    Raises: CheckpointError if they are not all of one dtype.
    """
    persistent = model.state_dict(keep_vars=True)
    named: dict[str, Tensor] = dict(model.named_parameters())
    named |= {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in persistent and buffer.is_floating_point() and name not in named
    }
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in named.values()}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{type(model).__name__} keeps tensors in {' and '.join(sorted(dtypes))}; expected one dtype: "
            "merge in float32 (dtype: float32)"
        )
    return named


def tensor_index(model: nn.Module) -> TensorIndex:
    """List what is merged, in the model's order."""
    return tuple(TensorInfo(name, tuple(tensor.shape)) for name, tensor in merged_tensors(model).items())


class ResidentModel:
    """A model in memory that candidates overwrite in place, on one device or on several.

    ``module`` is the live model; ``buffers`` are the flat buffers behind its parameters, one a device, and ``shares``
    say what lies in each. The first device is where inputs go.
    Raises: InputError if the devices have too little room, or the model cannot be divided.
    """

    def __init__(self, module: nn.Module, rooms: Sequence[Room]) -> None:
        named = merged_tensors(module)
        self.layout = Layout.of(tensor_index(module))
        self.shares = spread(module, named, self.layout, rooms)
        self.buffers: list[Tensor] = []
        self._layouts = [Layout.of(tuple(self.layout.tensors[s] for s in share.tensors)) for share in self.shares]
        self._views: dict[str, Tensor] = {}
        first = next(iter(named.values()))
        for share, layout in zip(self.shares, self._layouts, strict=True):
            buffer_P = torch.zeros(layout.num_padded, dtype=first.dtype, device=share.device)
            layout.flatten(named, buffer_P)
            self.buffers.append(buffer_P)
            self._views |= layout.views(buffer_P)
        for name, tensor in named.items():
            tensor.requires_grad_(False)
            tensor.data = self._views[name]
        # The merged tensors are there already: a GPU never holds them twice.
        settle(module, self.shares)
        self.module = module
        self._tensors = merged_tensors(module)

    def pieces(self, changed: Sequence[int] | None = None) -> list[tuple[slice, Tensor]]:
        """Return the buffers' elements of the given tensors (None: of all) in few pieces, in the layout's order.

        With each goes its place in a flat buffer of the whole model.
        """
        asked = set(range(len(self.layout.tensors)) if changed is None else changed)
        found = []
        for share, layout, buffer_P in zip(self.shares, self._layouts, self.buffers, strict=True):
            numbers = {s: i for i, s in enumerate(share.tensors)}
            for run in self.layout.runs(sorted(asked & numbers.keys())):
                first = int(layout.first_block[numbers[int(self.layout.block_segment[run.start])]])
                piece_P = buffer_P[first * BLOCK : (first + run.stop - run.start) * BLOCK]
                found.append((slice(run.start * BLOCK, run.stop * BLOCK), piece_P))
        return sorted(found, key=lambda piece: piece[0].start)

    def ship(self, merged_P: Tensor, changed: Sequence[int] | None) -> None:
        """Copy the given tensors (None: all) of a flat buffer of the whole model into the model."""
        for here, piece_P in self.pieces(changed):
            piece_P.copy_(merged_P[here])

    @property
    def devices(self) -> tuple[Room, ...]:
        """What each device holds."""
        pairs = zip(self.shares, self.buffers, strict=True)
        return tuple(Room(share.device, buffer_P.nbytes) for share, buffer_P in pairs)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name."""
        return {name: tensor for name, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter)}

    def check_views(self) -> None:
        """Raise EvoMergeError if something replaced the model's tensors, so that it no longer shows the merge."""
        for name, tensor in merged_tensors(self.module).items():
            if name not in self._views or tensor.data_ptr() != self._views[name].data_ptr():
                raise EvoMergeError(
                    f"{name} no longer lies in the merge buffer: the evaluator must not cast, resize or replace the "
                    "resident model's tensors"
                )

    def save(self, folder: Path, shard_size: str) -> None:
        """Write the model as a Hugging Face checkpoint (safetensors and configuration), file by file and uncopied."""
        with quiet_transformers():
            self.module.save_pretrained(folder, max_shard_size=shard_size)  # type: ignore[operator]
        config = json.loads((folder / "config.json").read_text())
        if not config.get("architectures"):
            config["architectures"] = [type(self.module).__name__]
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
