"""Language tasks on local data: one JSON Lines file a task, all lines of one form.

    {"source": ..., "text": ...}                                  loss of the text
    {"source": ..., "prompt": ..., "answer": ...}                 exact match of the greedy answer, and its loss
    {"source": ..., "prompt": ..., "choices": [...], "gold": 0}   accuracy of the likeliest choice, loss of the right

Tokens are made once. Sequences are padded on the right, where a causal model never looks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from evomerge.errors import DataError
from evomerge.evaluators.evaluator import ItemScores, digest_of
from evomerge.records import Direction, Items, Options

Form = Literal["text", "answer", "choice"]
FORMS: dict[Form, frozenset[str]] = {
    "choice": frozenset({"prompt", "choices", "gold"}),
    "answer": frozenset({"prompt", "answer"}),
    "text": frozenset({"text"}),
}
METRICS: dict[Form, dict[str, Direction]] = {
    "text": {"loss": "min"},
    "answer": {"exact_match": "max", "loss": "min"},
    "choice": {"accuracy": "max", "loss": "min"},
}


class LanguageOptions(Options):
    """data: the folder of the task files; batch_size: sequences a forward."""

    data: str
    batch_size: int = 64


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens, and how many at their end are scored."""

    tokens: tuple[int, ...]
    num_scored: int


@dataclass(frozen=True, slots=True)
class _Task:
    """The form of a task and, for every item, its sequences (one, or one a choice) and the right choice."""

    form: Form
    sequences: tuple[tuple[_Sequence, ...], ...]
    gold: tuple[int, ...]


class LanguageEvaluator:
    """Loss in nats a token, exact match and multiple choice of a causal language model.

    Raises: DataError for a missing or malformed file, an empty text, or a sequence longer than the model takes.
    """

    losses = frozenset({"ce", "entropy"})

    def __init__(self, options: LanguageOptions, tasks: Sequence[str], base: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{base}: expected a tokenizer beside the base's weights ({reason})") from error
        limit = getattr(AutoConfig.from_pretrained(base, local_files_only=True), "max_position_embeddings", None)
        self.batch_size = options.batch_size
        self._tasks: dict[str, _Task] = {}
        self.sources: dict[str, Sequence[int | str]] = {}
        for task in tasks:
            lines = _read_lines(Path(options.data), task)
            self.sources[task] = [line["source"] for line in lines]
            self._tasks[task] = _tokenize(task, lines, tokenizer)
            longest = max(len(sequence.tokens) for item in self._tasks[task].sequences for sequence in item)
            if limit is not None and longest > limit:
                raise DataError(f"task {task}: an item has {longest} tokens, but the model takes {limit}; cut it")
        self.digest = digest_of(Path(options.data) / f"{task}.jsonl" for task in tasks)

    def metrics(self, task: str) -> Mapping[str, Direction]:
        """Depends on the form of the task's lines."""
        return METRICS[self._tasks[task].form]

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Score each item; a loss is the mean over the item's scored tokens, for choices -log p(right | choices)."""
        held = self._tasks[task]
        chosen = [held.sequences[item] for item in items]
        flat = [sequence for sequences in chosen for sequence in sequences]
        total, exact = torch.zeros(len(flat), dtype=torch.float64), torch.zeros(len(flat), dtype=torch.bool)
        with torch.inference_mode():
            for where, logits, targets, scored in self._forwards(model, flat):
                logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
                total[where] = (logp * scored).double().sum(1).cpu()
                exact[where] = ((logits.argmax(-1) == targets) | ~scored).all(1).cpu()
        if held.form == "choice":
            return _choice_scores(total, [len(sequences) for sequences in chosen], [held.gold[item] for item in items])
        loss = -total / torch.tensor([sequence.num_scored for sequence in flat])
        scores = {"loss": loss.float().numpy()}
        return scores if held.form == "text" else {"exact_match": exact.float().numpy(), **scores}

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean over items of the loss of the right answer, or of the entropy of the predictions where it stands."""
        held = self._tasks[task]
        flat = [held.sequences[item][held.gold[item]] for item in items]
        sums = []
        for _, logits, targets, scored in self._forwards(model, flat):
            logp = logits.log_softmax(-1)
            right, entropy = -logp.gather(-1, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
            per_token = right if name == "ce" else entropy
            sums.append(((per_token * scored).sum(1) / scored.sum(1)).sum())
        return torch.stack(sums).sum() / len(flat)

    def _forwards(
        self, model: nn.Module, sequences: Sequence[_Sequence]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (indices, float32 logits, next tokens, which of them are scored), batched by length."""
        device = next(model.parameters()).device
        by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
        for start in range(0, len(by_length), self.batch_size):
            where = by_length[start : start + self.batch_size]
            batch = [sequences[index] for index in where]
            width = max(len(sequence.tokens) for sequence in batch)
            tokens = torch.tensor([[*sequence.tokens, *[0] * (width - len(sequence.tokens))] for sequence in batch])
            ends = torch.tensor([len(sequence.tokens) for sequence in batch])[:, None]
            starts = ends - torch.tensor([sequence.num_scored for sequence in batch])[:, None]
            position = torch.arange(1, width)
            scored = (position >= starts) & (position < ends)
            tokens, scored = tokens.to(device), scored.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            yield torch.tensor(where), logits, tokens[:, 1:], scored


def _choice_scores(total: Tensor, num_choices: Sequence[int], gold: Sequence[int]) -> ItemScores:
    rows = total.split(list(num_choices))
    return {
        "accuracy": np.array([int(row.argmax()) == right for row, right in zip(rows, gold, strict=True)], np.float32),
        "loss": np.array([-row.log_softmax(0)[right] for row, right in zip(rows, gold, strict=True)], np.float32),
    }


def _tokenize(task: str, lines: Sequence[Mapping[str, Any]], tokenizer: Any) -> _Task:
    form = next(form for form, keys in FORMS.items() if keys <= lines[0].keys())
    sequences = []
    for number, line in enumerate(lines, start=1):
        if form == "text":
            tokens = _tokens(tokenizer, line["text"])
            item: tuple[_Sequence, ...] = (_Sequence(tokens, len(tokens) - 1),)
        else:
            answers = line["choices"] if form == "choice" else [line["answer"]]
            item = tuple(_continuation(tokenizer, line["prompt"], answer) for answer in answers)
        if min(sequence.num_scored for sequence in item) < 1:
            raise DataError(f"task {task}, line {number}: expected at least one token to score, found none")
        sequences.append(item)
    return _Task(form, tuple(sequences), tuple(line.get("gold", 0) for line in lines))


def _continuation(tokenizer: Any, prompt: str, answer: str) -> _Sequence:
    """Tokenize prompt and answer as one text, as the model was trained, and score the answer's part."""
    whole = _tokens(tokenizer, prompt + answer)
    return _Sequence(whole, min(len(whole) - len(_tokens(tokenizer, prompt)), len(whole) - 1))


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokenize, without the end token that some tokenizers append: the text goes on, or is scored as it stands."""
    tokens = tuple(tokenizer(text)["input_ids"])
    ends = tokenizer.eos_token_id is not None and tokens[-1:] == (tokenizer.eos_token_id,)
    return tokens[:-1] if ends and not text.endswith(tokenizer.eos_token) else tokens


def _read_lines(folder: Path, task: str) -> list[dict[str, Any]]:
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "none"
        raise DataError(f"task {task}: expected the file {path}, found none; tasks there: {known}")
    lines: list[dict[str, Any]] = []
    try:
        content = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task {task}: {path} cannot be read as UTF-8 ({error})") from error
    if not content:
        raise DataError(f"task {task}: {path} is empty")
    for number, text in enumerate(content.split("\n"), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(f"task {task}: {path}, line {number}: not JSON ({error})") from error
        keys = set(line) if isinstance(line, dict) else set()
        if keys - {"source"} not in FORMS.values() or "source" not in keys:
            raise DataError(
                f"task {task}: {path}, line {number}: expected source and either text, or prompt and answer, or "
                f"prompt, choices and gold; found {', '.join(sorted(keys)) or type(line).__name__}"
            )
        if lines and keys != lines[0].keys():
            raise DataError(f"task {task}: {path}, line {number}: expected the same keys as in line 1")
        if flaw := _flaw(line):
            raise DataError(f"task {task}: {path}, line {number}: {flaw}")
        lines.append(line)
    return lines


def _flaw(line: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the values of a line whose keys are right."""
    if isinstance(line["source"], bool) or not isinstance(line["source"], int | str):
        return f"expected source to be a string or a whole number, found {line['source']!r}"
    for key in ("text", "prompt", "answer"):
        if not isinstance(line.get(key, ""), str):
            return f"expected {key} to be a string, found {line[key]!r}"
    if "choices" not in line:
        return None
    choices, gold = line["choices"], line["gold"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return f"expected choices to be a list of strings, found {choices!r}"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold is {gold!r} of {len(choices)} choices; expected the index of the right one, from 0"
    return None
