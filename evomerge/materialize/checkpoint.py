"""Checkpoints: where they lie, what tensors they hold, and whether they fit each other; nothing is loaded here.

safetensors only: a pickle can run code. Index files cannot point outside their folder.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import CheckpointError

Header = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name in the file -> (shape, safetensors dtype such as BF16)."""

FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder in Hugging Face's layout: its configuration and the headers of its safetensors files."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    header: Header

    @property
    def dtype(self) -> str:
        """The one floating dtype of its tensors. Raises: CheckpointError if there are several or an unknown one."""
        found = sorted({dtype for _, dtype in self.header.values() if "F" in dtype})
        if len(found) != 1 or found[0] not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.name}: expected tensors of one dtype out of {', '.join(FLOAT_DTYPES)}, found "
                f"{', '.join(found) or 'none'}; say which to merge in: dtype: bfloat16"
            )
        return FLOAT_DTYPES[found[0]]


def open_checkpoint(name: str, location: str | Path) -> Checkpoint:
    """Open a local folder, or else a Hugging Face id (downloaded to the hub's cache).

    name says in messages whose checkpoint this is. Raises: CheckpointError if there is none or it cannot be read.
    """
    folder = Path(location)
    if not folder.is_dir():
        folder = _download(name, str(location), folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{name}: expected a checkpoint folder with config.json, found none in {folder}")
    return Checkpoint(name, folder, _read_json(name, config_file), _read_header(name, folder))


def require_same_tensors(base: Checkpoint, expert: Checkpoint, tied: frozenset[str]) -> None:
    """Raise CheckpointError unless both hold tensors of the same names and shapes.

    ``tied`` names tensors that share another's storage: some tools write them, some do not; they are left out.
    """
    ours = {name: shape for name, (shape, _) in base.header.items() if name not in tied}
    theirs = {name: shape for name, (shape, _) in expert.header.items() if name not in tied}
    hint = "an expert must be a fine-tuned checkpoint of the same base"
    for verb, names in (("misses", ours.keys() - theirs.keys()), ("adds", theirs.keys() - ours.keys())):
        if names:
            raise CheckpointError(f"{expert.name} {verb} {_count(names)} against the base: {_some(names)}; {hint}")
    differing = {name for name, shape in ours.items() if theirs[name] != shape}
    if differing:
        first = min(differing)
        raise CheckpointError(
            f"{expert.name}: {first}: expected shape {_shape(ours[first])} as in the base, found "
            f"{_shape(theirs[first])} ({_count(differing)} differ); {hint} (same vocabulary, same head)"
        )


def _download(name: str, repo_id: str, folder: Path) -> Path:
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"{name}: expected a checkpoint folder or a Hugging Face id, found no folder {folder}")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
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
        weight_map = _read_json(name, index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{name}: {index}: expected weight_map to say in which file each tensor is")
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{name}: {index}: shard {shard!r} lies outside the folder; refused")
            shards[shard] = _read_safetensors_header(name, folder / shard)
        header = {tensor: info for shard in shards.values() for tensor, info in shard.items()}
        if header.keys() != weight_map.keys():
            wrong = header.keys() ^ weight_map.keys()
            raise CheckpointError(f"{name}: {index} and its shards disagree about {_count(wrong)}: {_some(wrong)}")
        return header
    if single.is_file():
        return _read_safetensors_header(name, single)
    others = [path.name for path in folder.glob("*.bin")]
    raise CheckpointError(
        f"{name}: expected model.safetensors or model.safetensors.index.json in {folder}, found "
        f"{', '.join(others) or 'neither'}; pickled weights are not read: save them again as safetensors"
    )


def _read_safetensors_header(name: str, path: Path) -> Header:
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


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: {path}: expected a JSON object, found {type(content).__name__}")
    return content


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _some(names: Collection[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
