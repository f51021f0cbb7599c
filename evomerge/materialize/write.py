"""Writing a merged model to disk: into a folder beside the target, read back, made durable, moved in one step."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import EvoMergeError, InputError
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import Materializer, tensors_hash
from evomerge.materialize.resident import load_model

SHARD_SIZE = "5GB"
"""Largest file of weights unless another size is asked for: several parts download side by side, and resume."""


def write_checkpoint(
    materializer: Materializer, out: Path, add: Callable[[Path], None], *, shard_size: str = SHARD_SIZE
) -> str:
    """Write the resident model to ``out`` as a Hugging Face checkpoint; return the SHA-256 of its tensors.

    Weights are written file by file as they lie in memory, none larger than ``shard_size`` unless one tensor is. The
    materializer then gives up base and experts, so that reading back needs no more memory than merging did. ``add``
    writes whatever else belongs beside the weights. What was written is loaded again, as a user would, and must hold
    the same bits before it is moved into place.
    Raises: InputError if ``out`` exists and is not empty; EvoMergeError if the check fails.
    """
    expected = materializer.weights_hash()
    with new_folder(out) as folder:
        materializer.resident.save(folder, shard_size)
        add(folder)
        dtype = str(materializer.out_P.dtype).removeprefix("torch.")
        materializer.let_go()
        found = tensors_hash(load_model(open_checkpoint(str(folder), folder), dtype))
        if found != expected:
            raise EvoMergeError(
                f"the written model holds other tensors ({found[:12]}) than the merged one ({expected[:12]})"
            )
    return expected


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` when the block ends, in one step; if the block fails, nothing is left.

    The folder is ``.NAME.part/model`` beside ``out``. What a killed process left there is removed first.
    Raises: InputError if ``out`` exists and is not empty, or if another process is writing it.
    """
    from filelock import FileLock, Timeout

    require_new(out)
    part = out.parent / f".{out.name}.part"
    part.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(part / "lock", timeout=0):
            require_new(out)  # whoever held the lock may have written it
            folder = part / "model"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
                _sync(folder)
                folder.rename(out)  # an empty folder gives way
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except Timeout as error:
        raise InputError(f"{out}: another process is writing it; wait for it, or choose another --out") from error
    _sync_names(out.parent)


def require_new(out: Path) -> None:
    """Raise InputError unless ``out`` is missing or an empty folder; asked again before anything is loaded."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a folder that is new or empty; choose another --out")


def require_size(text: str) -> str:
    """Return a size such as ``5GB`` or ``500MB`` as it is. Raises: InputError."""
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]B", text):
        raise InputError(f"--shard-size: expected a size such as 5GB or 500MB, found {text!r}")
    return text


def _sync(folder: Path) -> None:
    """Have the disk hold a folder's files and their names before it is moved: a power cut leaves no empty files."""
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files for their owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders are not opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
