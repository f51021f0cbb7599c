"""Vocabularies: which row of an expert's embeddings belongs to which row of the base's.

A row means a token. Where both tokenizers are at hand and differ, an expert's rows are put where the base has the same
token string; tokens that the expert lacks keep the base's row (their task vector is zero), tokens that only it has are
dropped. What was decided is said in one line, which the commands show.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CheckpointError

Vocabulary = dict[str, int]
"""Token string -> row."""


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """expert_rows: for every row of the base the expert's row of the same token, or -1; shape (rows of the base,)."""

    expert_rows: Tensor
    num_moved: int
    missing: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def decision(self) -> str:
        """Say in one line what becomes of the tokens that differ."""
        parts = [
            f"{self.num_moved} tokens moved to the base's rows" if self.num_moved else "",
            f"{_some(self.missing)} missing, the base's rows stay" if self.missing else "",
            f"{_some(self.dropped)} only in the expert, dropped" if self.dropped else "",
        ]
        return "; ".join(part for part in parts if part) or "the same tokens, padded to another number of rows"

    def apply(self, expert: Tensor, base: Tensor) -> Tensor:
        """Return the expert's rows in the base's order (rows of the base, ...), in the expert's dtype."""
        aligned = base.to(expert.dtype, copy=True)
        held = (self.expert_rows >= 0) & (self.expert_rows < len(expert))
        aligned[held] = expert[self.expert_rows[held]]
        return aligned


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the tokens of a checkpoint's tokenizer, or None if it has none that can be read without running code.

    Reads tokenizer.json, or vocab.json, or vocab.txt; and added_tokens.json beside the latter two.
    """
    if (path := folder / "tokenizer.json").is_file():
        content = _read(path)
        pieces = content.get("model", {}).get("vocab", {})
        vocabulary = (
            dict(pieces) if isinstance(pieces, Mapping) else {piece: row for row, (piece, *_) in enumerate(pieces)}
        )
        vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        return vocabulary
    if (path := folder / "vocab.json").is_file():
        vocabulary = dict(_read(path))
    elif (path := folder / "vocab.txt").is_file():
        vocabulary = {token: row for row, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
    else:
        return None
    if (path := folder / "added_tokens.json").is_file():
        vocabulary |= _read(path)
    return vocabulary


def align(base: Vocabulary, expert: Vocabulary, num_rows: int) -> Alignment:
    """Compare two vocabularies for a base of ``num_rows`` embeddings.

    Rows beyond the base's tokens (padding to a round number) take the expert's row of the same number, unless that is
    one of its tokens.
    """
    used = set(expert.values())
    rows = torch.tensor([-1 if row in used else row for row in range(num_rows)])
    for token, row in base.items():
        if row < num_rows:
            rows[row] = expert.get(token, -1)
    missing = tuple(token for token in base if token not in expert)
    dropped = tuple(token for token in expert if token not in base)
    num_moved = sum(token in expert and expert[token] != row for token, row in base.items())
    return Alignment(rows, num_moved, missing, dropped)


def vocabulary_tensors(model: nn.Module) -> frozenset[str]:
    """Name the tensors with one row a token: embeddings, head and the head's bias."""
    modules = [
        found
        for getter in ("get_input_embeddings", "get_output_embeddings")
        if (found := _module(model, getter)) is not None
    ]
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in own)


def _module(model: nn.Module, getter: str) -> Any:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # an architecture without token embeddings
        return None
    return found if isinstance(found, nn.Embedding | nn.Linear) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _some(tokens: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
    return f"{len(tokens)} token{'s' if len(tokens) != 1 else ''} ({shown})"
