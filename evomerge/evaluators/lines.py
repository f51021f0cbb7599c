"""Local language data: one JSON Lines file a task, every line with its source, and the base's tokenizer for it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import DataError
from evomerge.evaluators.layouts import TokenSequence


def path_of(folder: Path, task: str) -> Path:
    """Return where a task's lines are."""
    return folder / f"{task}.jsonl"


def read_lines(
    path: Path, task: str, flaw: Callable[[Mapping[str, Any]], str | None], *, sourced: bool = True
) -> list[dict[str, Any]]:
    """Read a task's lines, one JSON object each, all with the keys of the first.

    flaw: says what is wrong with a line, or None; the source is checked here, where the lines are items (sourced).
    Raises: DataError for a missing or malformed file.
    """
    where = f"task {task}: {path}"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.jsonl"))) or "none"
        raise DataError(f"task {task}: expected the file {path}, found none; tasks there: {known}")
    try:
        content = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read as UTF-8 ({error})") from error
    if not content:
        raise DataError(f"{where} is empty")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(content.split("\n"), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}, line {number}: not JSON ({error})") from error
        if wrong := _flaw_of_any(line, sourced) or flaw(line):
            raise DataError(f"{where}, line {number}: {wrong}")
        if lines and line.keys() != lines[0].keys():
            raise DataError(f"{where}, line {number}: expected the same keys as in line 1")
        lines.append(line)
    return lines


def _flaw_of_any(line: object, sourced: bool) -> str | None:
    if not isinstance(line, dict):
        return f"expected a JSON object, found {type(line).__name__}"
    if not sourced:
        return None
    if "source" not in line:
        return f"expected source, the same for lines that must not be parted; found {', '.join(sorted(line))}"
    if isinstance(line["source"], bool) or not isinstance(line["source"], int | str):
        return f"expected source to be a string or a whole number, found {line['source']!r}"
    return None


def open_tokenizer(base: Path) -> Any:
    """Return the tokenizer beside the base's weights. Raises: DataError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{base}: expected a tokenizer beside the base's weights ({reason})") from error


def token_limit(base: Path) -> int | None:
    """Return how many tokens the model takes, or None where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, local_files_only=True)
    limit: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def continuation(tokenizer: Any, prompt: str, answer: str) -> TokenSequence:
    """Tokenize prompt and answer as one text, as the model was trained, and score the answer's part."""
    whole = text_tokens(tokenizer, prompt + answer)
    return TokenSequence(whole, min(len(whole) - len(text_tokens(tokenizer, prompt)), len(whole) - 1))


def text_tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokenize, without the end token that some tokenizers append: the text goes on, or is scored as it stands."""
    tokens = tuple(tokenizer(text)["input_ids"])
    ends = tokenizer.eos_token_id is not None and tokens[-1:] == (tokenizer.eos_token_id,)
    return tokens[:-1] if ends and not text.endswith(tokenizer.eos_token) else tokens
