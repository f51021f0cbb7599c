"""What a merged model's user needs beside weights and configuration, and which checkpoint each of these files is from.

Tokenizer files and chat template belong together and come from one checkpoint; processor files and the generation
configuration from the same one where it has them, else from the base.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evomerge.errors import CheckpointError, InputError, did_you_mean
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.checkpoint import Checkpoint, read_json
from evomerge.materialize.vocabulary import read_vocabulary

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
)
OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
BASE = "base"


@dataclass(frozen=True, slots=True)
class Companions:
    """The files to copy, by name, and whose each is; notes say what a person should know of the choice."""

    files: Mapping[str, Path]
    owners: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())

    def copy(self, folder: Path) -> None:
        """Copy the files beside a model's weights, over those that were written with them."""
        for name, path in self.files.items():
            shutil.copyfile(path, folder / name)

    @property
    def origin(self) -> str:
        """Say which files are whose, such as ``tokenizer.json and tokenizer_config.json of base``; empty if none."""
        owners = dict.fromkeys(self.owners.values())
        return "; ".join(
            f"{', '.join(sorted(name for name, of in self.owners.items() if of == owner))} of {owner}"
            for owner in owners
        )


def choose_companions(
    base: Checkpoint, experts: Mapping[str, Checkpoint | Adapter], chosen: str | None = None
) -> Companions:
    """Return the companions of a merge: the base's, or those of the expert whose tokenizer was chosen by name.

    Raises: InputError if there is no such expert, it has no tokenizer, or one with another vocabulary than the base's,
    in whose order the merged model has its tokens.
    """
    folders = {BASE: base.folder, **{name: expert.folder for name, expert in experts.items()}}
    source = chosen or BASE
    if source not in folders:
        raise InputError(f"--tokenizer-from: no expert {source!r}{did_you_mean(source, folders)}")
    found = {path.name: source for path in companion_files(folders[source], TOKENIZER)}
    if source != BASE:
        _require_suitable(base, folders[source], source, has_files=bool(found))
    for owner in dict.fromkeys((BASE, source)):  # the chosen one's take the place of the base's
        found |= {path.name: owner for path in companion_files(folders[owner], OTHERS)}
    files = {name: folders[owner] / name for name, owner in found.items()}
    return Companions(files, found, tuple(_notes(folders, source)))


def companion_files(folder: Path, patterns: Sequence[str] = (*TOKENIZER, *OTHERS)) -> list[Path]:
    """Return the files of a checkpoint that are companions, or those of them that match some patterns."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def chat_template(folder: Path) -> str | None:
    """Return a tokenizer's chat template, from the file of its own or from the configuration; None if it has none."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            try:
                template = read_json(folder.name, path).get("chat_template")
            except CheckpointError:  # whoever loads the tokenizer will say so
                return None
            if template is not None:
                return str(template)
    return None


def _require_suitable(base: Checkpoint, folder: Path, name: str, *, has_files: bool) -> None:
    vocabulary = read_vocabulary(folder)
    if not has_files or vocabulary is None:
        raise InputError(
            f"--tokenizer-from {name}: {folder} holds no tokenizer; expected tokenizer.json or a vocabulary"
        )
    if base.vocabulary is not None and vocabulary != base.vocabulary:
        raise InputError(
            f"--tokenizer-from {name}: its vocabulary is not the base's ({len(vocabulary)} tokens against "
            f"{len(base.vocabulary)}), in whose order the merged model has its tokens; leave the option out"
        )


def _notes(folders: Mapping[str, Path], source: str) -> list[str]:
    """Name the chat templates that differ from the one that is written."""
    written = chat_template(folders[source])
    others = {name: chat_template(folder) for name, folder in folders.items()}
    differing = [name for name, template in others.items() if template is not None and template != written]
    if not differing:
        return []
    what = f"the chat template written is that of {source}" if written else f"{source} has no chat template"
    verb = "has another" if written else "has one"
    takes = f"--tokenizer-from {differing[0]} takes that one's tokenizer files"
    return [f"{what}; {' and '.join(differing)} {verb}: {takes}"]
