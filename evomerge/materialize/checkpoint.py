"""Checkpoints: where they lie, what tensors they hold, and whether they fit each other; nothing is loaded here.

safetensors only: a pickle can run code. Index files cannot point outside their folder.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from evomerge.errors import CheckpointError
from evomerge.materialize.vocabulary import Alignment, Vocabulary, align, read_vocabulary

Header = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name in the file -> (shape, safetensors dtype such as BF16)."""

FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's layout: its configuration and the headers of its safetensors files."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    header: Header
    alignment: Alignment | None = None
    """Where this expert's rows go, if its vocabulary is not the base's."""

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of its tokenizer, or None."""
        return read_vocabulary(self.folder)

    @property
    def dtypes(self) -> set[str]:
        """The floating dtypes of its tensors, by torch's names where torch merges them."""
        return {FLOAT_DTYPES.get(dtype, dtype) for _, dtype in self.header.values() if "F" in dtype}

    @property
    def dtype(self) -> str:
        """The one floating dtype of its tensors. Raises: CheckpointError if there are several or an unknown one."""
        found = sorted(self.dtypes)
        if len(found) != 1 or found[0] not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"{self.name}: expected tensors of one dtype out of {', '.join(FLOAT_DTYPES)}, found "
                f"{', '.join(found) or 'none'}; say which to merge in: dtype: bfloat16"
            )
        return found[0]


def open_checkpoint(name: str, location: str | Path) -> Checkpoint:
    """Open a local folder, or else a Hugging Face id (downloaded to the hub's cache).

    name says in messages whose checkpoint this is. Raises: CheckpointError if there is none or it cannot be read.
    """
    folder = find_folder(name, location)
    config_file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{name}: {folder} holds an adapter; expected a checkpoint (an expert can be either)")
    if not config_file.is_file():
        raise CheckpointError(f"{name}: expected a checkpoint folder with config.json, found none in {folder}")
    return Checkpoint(name, folder, read_json(name, config_file), _read_header(name, folder))


def fit_to_base(base: Checkpoint, expert: Checkpoint, tied: frozenset[str], vocabulary: frozenset[str]) -> Checkpoint:
    """Return the expert, with its alignment if it has another vocabulary.

    ``tied`` names tensors that share another's storage: some tools write them, some do not; they are left out.
    ``vocabulary`` names those with one row a token: only they may differ in their first dimension, and only where
    both tokenizers are at hand.
    Raises: CheckpointError unless both hold tensors of the same names and shapes.
    """
    ours = {name: shape for name, (shape, _) in base.header.items() if name not in tied}
    theirs = {name: shape for name, (shape, _) in expert.header.items() if name not in tied}
    hint = "an expert must be a fine-tuned checkpoint of the same base"
    for verb, names in (("misses", ours.keys() - theirs.keys()), ("adds", theirs.keys() - ours.keys())):
        if names:
            raise CheckpointError(f"{expert.name} {verb} {_count(names)} against the base: {_some(names)}; {hint}")
    differing = {name for name, shape in ours.items() if theirs[name] != shape}
    by_token = ours.keys() & vocabulary
    padded = {name for name in differing & by_token if ours[name][1:] == theirs[name][1:]}
    alignment = _align(base, expert, ours[min(by_token)][0], same_rows=not padded) if by_token else None
    if beyond := differing - (padded if alignment else set()):
        first = min(beyond)
        others = "same head" if beyond - padded else "no tokenizer lies beside both to align the tokens by"
        raise CheckpointError(
            f"{expert.name}: {first}: expected shape {_shape(ours[first])} as in the base, found "
            f"{_shape(theirs[first])} ({_count(beyond)} differ); {hint} (same vocabulary; {others})"
        )
    return replace(expert, alignment=alignment)


def _align(base: Checkpoint, expert: Checkpoint, num_rows: int, *, same_rows: bool) -> Alignment | None:
    """Compare the tokenizers; None if one is not at hand, or if every token has the same row."""
    ours, theirs = base.vocabulary, expert.vocabulary
    if ours is None or theirs is None or (ours == theirs and same_rows):
        return None
    return align(ours, theirs, num_rows)


def find_folder(name: str, location: str | Path) -> Path:
    """Return a local folder, or where the hub's files of that id lie. Raises: CheckpointError."""
    folder = Path(location)
    return folder if folder.is_dir() else _download(name, str(location), folder)


def hub_id(folder: Path) -> str | None:
    """Return the Hugging Face id of a folder in the hub's cache (``models--OWNER--NAME/snapshots/REVISION``)."""
    kind, _, name = folder.parent.parent.name.partition("--")
    is_cached = kind == "models" and folder.parent.name == "snapshots"
    return name.replace("--", "/", 1) if is_cached and "--" in name else None


def _download(name: str, repo_id: str, folder: Path) -> Path:
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"{name}: expected a checkpoint folder or a Hugging Face id, found no folder {folder}")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated classes: offline, gated, missing, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no folder {folder}, and {repo_id!r} cannot be had from the hub ({reason}); "
            "check the path, or download it where there is a network"
        ) from error


def _read_header(name: str, folder: Path) -> Header:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(name, index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{name}: {index}: expected weight_map to say in which file each tensor is")
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{name}: {index}: shard {shard!r} lies outside the folder; refused")
            shards[shard] = read_safetensors_header(name, folder / shard)
        header = {tensor: info for shard in shards.values() for tensor, info in shard.items()}
        if header.keys() != weight_map.keys():
            wrong = header.keys() ^ weight_map.keys()
            raise CheckpointError(f"{name}: {index} and its shards disagree about {_count(wrong)}: {_some(wrong)}")
        return header
    if single.is_file():
        return read_safetensors_header(name, single)
    others = [path.name for path in folder.glob("*.bin")]
    raise CheckpointError(
        f"{name}: expected model.safetensors or model.safetensors.index.json in {folder}, found "
        f"{', '.join(others) or 'neither'}; pickled weights are not read: save them again as safetensors"
    )


def read_safetensors_header(name: str, path: Path) -> Header:
    """Return what a safetensors file holds, without reading it. Raises: CheckpointError if it is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 100_000_000:
                raise ValueError("no safetensors header")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("no safetensors header")
            header.pop("__metadata__", None)
            end = 8 + length + max((int(info["data_offsets"][1]) for info in header.values()), default=0)
            found = {tensor: (tuple(map(int, info["shape"])), str(info["dtype"])) for tensor, info in header.items()}
        if path.stat().st_size != end:
            raise ValueError(f"expected {end} bytes, found {path.stat().st_size}: the file is cut short")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{name}: {path} cannot be read ({error})") from error
    return found


def read_json(name: str, path: Path) -> dict[str, Any]:
    """Return a file's JSON object. Raises: CheckpointError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: {path}: expected a JSON object, found {type(content).__name__}")
    return content


@contextmanager
def still_there(name: str, folder: Path) -> Iterator[None]:
    """Raise CheckpointError if tensors cannot be read that were there when their headers were."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: {folder} can no longer be read ({reason}); put its files back") from error


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _some(names: Collection[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
