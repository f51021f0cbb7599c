"""Language tasks on local data: one JSON Lines file a task, all lines of one form.

    {"source": ..., "text": ...}                                  loss of the text
    {"source": ..., "prompt": ..., "answer": ...}                 exact match of the greedy answer, and its loss
    {"source": ..., "prompt": ..., "choices": [...], "gold": 0}   accuracy of the likeliest choice, loss of the right

Tokens are made once. Sequences are padded on the right, where a causal model never looks.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from evomerge.errors import DataError
from evomerge.evaluators.evaluator import LOSS, ItemScores, Metric, Wanted, digest_of, half
from evomerge.evaluators.layouts import TokenSequence
from evomerge.evaluators.lines import continuation, open_tokenizer, path_of, read_lines, text_tokens, token_limit
from evomerge.evaluators.sequences import logprobs, mean_loss, scored_logits
from evomerge.records import Items, Options

Form = Literal["text", "answer", "choice"]
FORMS: dict[Form, frozenset[str]] = {
    "choice": frozenset({"prompt", "choices", "gold"}),
    "answer": frozenset({"prompt", "answer"}),
    "text": frozenset({"text"}),
}
METRICS: dict[Form, dict[str, Metric]] = {
    "text": {LOSS: Metric("min")},
    "answer": {"exact_match": Metric("max"), LOSS: Metric("min")},
    "choice": {"accuracy": Metric("max"), LOSS: Metric("min")},
}


class LanguageOptions(Options):
    """data: the folder of the task files; batch_size: sequences a forward; prefix_cache: run common beginnings once."""

    data: str
    batch_size: int = Field(default=64, ge=1)
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class _Task:
    """The form of a task and, for every item, its sequences (one, or one a choice) and the right choice."""

    form: Form
    sequences: tuple[tuple[TokenSequence, ...], ...]
    gold: tuple[int, ...]


class LanguageEvaluator:
    """Loss in nats a token, exact match and multiple choice of a causal language model.

    Raises: DataError for a missing or malformed file, an empty text, or a sequence longer than the model takes.
    """

    losses = frozenset({"ce", "entropy", "kl"})

    def __init__(self, options: LanguageOptions, wanted: Wanted, base: Path) -> None:
        tokenizer, limit = open_tokenizer(base), token_limit(base)
        self._options = options
        self._tasks: dict[str, _Task] = {}
        self.sources: dict[str, Sequence[int | str]] = {}
        for task in wanted:
            path = path_of(Path(options.data), task)
            lines = read_lines(path, task, _flaw)
            self.sources[task] = [line["source"] for line in lines]
            self._tasks[task] = _tokenize(f"task {task}: {path}", lines, tokenizer, limit)
        self.digest = digest_of(path_of(Path(options.data), task) for task in wanted)

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """Depends on the form of the task's lines."""
        return METRICS[self._tasks[task].form]

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Score each item; a loss is the mean over the item's scored tokens, for choices -log p(right | choices)."""
        held = self._tasks[task]
        chosen = [held.sequences[item] for item in items]
        flat = [sequence for sequences in chosen for sequence in sequences]
        batch_size, share = self._options.batch_size, self._options.prefix_cache
        total, exact = logprobs(model, flat, batch_size, share_prefixes=share)
        if held.form == "choice":
            return _choice_scores(total, [len(sequences) for sequences in chosen], [held.gold[item] for item in items])
        loss = -total / torch.tensor([sequence.num_scored for sequence in flat])
        scores = {LOSS: loss.float().numpy()}
        if held.form == "answer":
            scores["exact_match"] = exact.float().where(total.isfinite(), torch.nan).numpy()
        return scores

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean over items of the loss of the right answer, or of the entropy of the predictions where it stands."""
        return mean_loss(model, self._right(task, items), self._options.batch_size, name)

    def halved(self) -> "LanguageEvaluator":
        """Take half as many sequences a forward."""
        twin = copy(self)
        twin._options = self._options.model_copy(update={"batch_size": half(self._options.batch_size)})
        return twin

    def logits(self, model: nn.Module, task: str, items: Items) -> list[Tensor]:
        """A row for each token of the right answer."""
        return scored_logits(model, self._right(task, items), self._options.batch_size)

    def _right(self, task: str, items: Items) -> list[TokenSequence]:
        held = self._tasks[task]
        return [held.sequences[item][held.gold[item]] for item in items]


def _choice_scores(total: Tensor, num_choices: Sequence[int], gold: Sequence[int]) -> ItemScores:
    """Accuracy, NaN where a choice has no finite log-probability, and -log p(right | choices)."""
    rows = total.split(list(num_choices))
    hits = [
        float(int(row.argmax()) == right) if bool(row.isfinite().all()) else np.nan
        for row, right in zip(rows, gold, strict=True)
    ]
    losses = [-row.log_softmax(0)[right] for row, right in zip(rows, gold, strict=True)]
    return {"accuracy": np.array(hits, np.float32), LOSS: np.array(losses, np.float32)}


def _tokenize(where: str, lines: Sequence[Mapping[str, Any]], tokenizer: Any, limit: int | None) -> _Task:
    form = _form(lines[0])
    assert form is not None  # the reader has refused other lines
    items = []
    for number, line in enumerate(lines, start=1):
        if form == "text":
            tokens = text_tokens(tokenizer, line["text"])
            item: tuple[TokenSequence, ...] = (TokenSequence(tokens, len(tokens) - 1),)
        else:
            answers = line["choices"] if form == "choice" else [line["answer"]]
            item = tuple(continuation(tokenizer, line["prompt"], answer) for answer in answers)
        if min(sequence.num_scored for sequence in item) < 1:
            raise DataError(f"{where}, line {number}: expected at least one token to score, found none")
        longest = max(len(sequence.tokens) for sequence in item)
        if limit is not None and longest > limit:
            raise DataError(f"{where}, line {number}: {longest} tokens, but the model takes {limit}; cut it")
        items.append(item)
    return _Task(form, tuple(items), tuple(line.get("gold", 0) for line in lines))


def _form(line: Mapping[str, Any]) -> Form | None:
    return next((form for form, keys in FORMS.items() if line.keys() - {"source"} == keys), None)


def _flaw(line: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a line beside its source."""
    if _form(line) is None:
        return (
            "expected source and either text, or prompt and answer, or prompt, choices and gold; "
            f"found {', '.join(sorted(line))}"
        )
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
