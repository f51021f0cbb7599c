"""Writing a merged model to disk: into a temporary folder, verified, then moved into place."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from evomerge.errors import EvoMergeError, InputError
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer, sha256
from evomerge.materialize.resident import load_model, merged_tensors

COMPANIONS = (  # what a checkpoint's user needs beside the weights; taken from the base as it is
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def write_checkpoint(materializer: Materializer, base: Checkpoint, out: Path, add: Callable[[Path], None]) -> str:
    """Write the resident model to ``out`` as a Hugging Face checkpoint; return the SHA-256 of its tensors.

    Tokenizer and processor files come from the base; ``add`` writes whatever else belongs beside them. What was
    written is loaded again and must hold the same bits before it is moved into place.
    Raises: InputError if ``out`` exists and is not empty; EvoMergeError if the check fails.
    """
    require_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        materializer.resident.save(folder)
        for pattern in COMPANIONS:
            for path in base.folder.glob(pattern):
                if path.is_file() and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        add(folder)
        expected = materializer.weights_hash()
        if (found := stored_hash(materializer, folder)) != expected:
            raise EvoMergeError(
                f"the written model holds other tensors ({found[:12]}) than the merged one ({expected[:12]})"
            )
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return expected


def require_new(out: Path) -> None:
    """Raise InputError unless ``out`` is missing or an empty folder; asked again before anything is loaded."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a folder that is new or empty; choose another --out")


def stored_hash(materializer: Materializer, folder: Path) -> str:
    """Return the hash of a written model's tensors, laid out as the resident model's."""
    checkpoint = open_checkpoint(str(folder), folder)
    dtype = str(materializer.out_P.dtype).removeprefix("torch.")
    buffer_P = materializer.out_P.new_zeros(materializer.layout.num_padded, device="cpu")
    materializer.layout.flatten(merged_tensors(load_model(checkpoint, dtype)), buffer_P)
    return sha256(buffer_P)
