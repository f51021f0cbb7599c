"""What a language model writes: exact answers, their length, and what a judge says of them.

    {"source": ..., "prompt": ...}                    length, and what the judge reports
    {"source": ..., "prompt": ..., "answer": ...}     exact_match too, and the loss of the answer as its companion

One JSON Lines file a task; with a judge, lines may hold further keys for it. The resident model answers greedily, or a
server that is given its weights (``endpoint``).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from evomerge.errors import DataError
from evomerge.evaluators.endpoint import Endpoint, EndpointOptions, Publisher, PublishOptions
from evomerge.evaluators.evaluator import LOSS, ItemScores, Metric, Wanted, digest_of, half
from evomerge.evaluators.generate import Limits, answer_text, end_tokens, generate
from evomerge.evaluators.judge import FunctionJudge, Judge, ModelJudge, ModelJudgeOptions
from evomerge.evaluators.layouts import TokenSequence
from evomerge.evaluators.lines import continuation, open_tokenizer, path_of, read_lines, text_tokens, token_limit
from evomerge.evaluators.sequences import logprobs, mean_loss, scored_logits
from evomerge.records import Items, Options, digest

LENGTH, EXACT_MATCH = "length", "exact_match"
BUILT_IN = (LENGTH, EXACT_MATCH, LOSS)


class ServedOptions(EndpointOptions):
    """A server that answers for the candidate; without ``publish`` it would answer the same for all of them."""

    publish: PublishOptions


class GenerationOptions(Options):
    """data: the folder of the task files; batch_size: answers written at a time; chat: with the chat template.

    An answer is over with an end token, at the first of the stop strings, or after max_new_tokens.
    """

    data: str
    batch_size: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    stop: list[str] = []
    chat: bool = False
    judge: str | ModelJudgeOptions | None = None
    endpoint: ServedOptions | None = None

    @field_validator("judge")
    @classmethod
    def _has_its_own_metric(cls, given: str | ModelJudgeOptions | None) -> str | ModelJudgeOptions | None:
        if isinstance(given, ModelJudgeOptions) and given.metric in BUILT_IN:
            raise ValueError(f"expected a metric of the judge's own, found {given.metric!r}, which needs no judge")
        return given


@dataclass(frozen=True, slots=True)
class _Task:
    """The lines of a task, their prompts as tokens and, where they have answers, prompt and answer."""

    lines: tuple[Mapping[str, Any], ...]
    prompts: tuple[tuple[int, ...], ...]
    references: tuple[TokenSequence, ...]


class GenerationEvaluator:
    """Scores what is written after prompts.

    exact_match: 1 where the answer is the reference, white space around it aside. length: tokens of the answer, its
    end token left out. loss: a token's mean loss of the reference answer, nats.
    Raises: DataError for a missing or malformed file, a prompt that leaves no room for the answer, a base without
    tokenizer or chat template; CampaignError for a judge that cannot be imported.
    """

    def __init__(self, options: GenerationOptions, wanted: Wanted, base: Path) -> None:
        self._options, self._wanted = options, wanted
        self._tokenizer = open_tokenizer(base)
        if options.chat and not self._tokenizer.chat_template:
            raise DataError(f"{base}: chat: true needs the tokenizer's chat template, found none; leave chat out")
        self._judge = _make_judge(options.judge)
        self._endpoint = Endpoint(options.endpoint) if options.endpoint else None
        self._publisher = Publisher(options.endpoint.publish, options.endpoint, base) if options.endpoint else None
        paths = {task: path_of(Path(options.data), task) for task in wanted}
        self._tasks = {task: self._read(task, path, token_limit(base)) for task, path in paths.items()}
        self.sources: Mapping[str, Sequence[int | str]] = {
            task: [line["source"] for line in held.lines] for task, held in self._tasks.items()
        }
        answered = all(held.references for held in self._tasks.values())
        self.losses = frozenset({"ce", "entropy", "kl"} if answered else ())
        asked = options.model_dump(mode="json", include={"max_new_tokens", "stop", "chat"})
        served = [options.endpoint.url, options.endpoint.model] if options.endpoint else None
        judged = self._judge.digest if self._judge else None
        self.digest = digest([asked, served, judged, digest_of(paths.values())])

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """Length; with answers exact_match and loss; and of a judge what objectives ask for, of no known direction."""
        metrics = {LENGTH: Metric("min", follows_loss=False)}
        if self._tasks[task].references:
            metrics |= {EXACT_MATCH: Metric("max"), LOSS: Metric("min")}
        return metrics | {metric: Metric(None, follows_loss=False) for metric in self._judged(task)}

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Have every prompt answered; the companion is the loss of the reference answer, whatever was written."""
        held = self._tasks[task]
        lines = [held.lines[item] for item in items]
        texts, lengths = self._answers(model, task, items)
        scores: ItemScores = {LENGTH: np.array(lengths, np.float32)}
        if held.references:
            matches = [text.strip() == line["answer"].strip() for text, line in zip(texts, lines, strict=True)]
            scores[EXACT_MATCH] = np.array(matches, np.float32)
            references = [held.references[item] for item in items]
            total, _ = logprobs(model, references, self._options.batch_size)
            scores[LOSS] = (-total / torch.tensor([reference.num_scored for reference in references])).float().numpy()
        if self._judge and (asked := self._judged(task)):
            scores |= self._judge.judge(lines, texts, asked)
        return scores

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean over items of the loss of the reference answer, or of the entropy of the predictions where it stands."""
        references = self._tasks[task].references
        if not references:
            raise DataError(f"task {task}: a search asks for the loss {name!r}; its lines have no answer to take it of")
        return mean_loss(model, [references[item] for item in items], self._options.batch_size, name)

    def halved(self) -> "GenerationEvaluator":
        """Take half as many prompts a forward."""
        twin = copy(self)
        twin._options = self._options.model_copy(update={"batch_size": half(self._options.batch_size)})
        return twin

    def logits(self, model: nn.Module, task: str, items: Items) -> list[Tensor]:
        """A row for each token of the reference answer."""
        references = self._tasks[task].references
        return scored_logits(model, [references[item] for item in items], self._options.batch_size)

    def _judged(self, task: str) -> list[str]:
        """Return the metrics that objectives ask the judge for."""
        others = [metric for metric in self._wanted[task] if metric not in BUILT_IN]
        return [metric for metric in others if self._judge and self._judge.knows(metric)]

    def _answers(self, model: nn.Module, task: str, items: Items) -> tuple[list[str], list[int]]:
        """Return the answers and how many tokens each of them has."""
        held, options = self._tasks[task], self._options
        if self._endpoint and self._publisher:
            self._publisher.publish(model)
            ask = self._endpoint.chat if options.chat else self._endpoint.complete
            prompts = [held.lines[item]["prompt"] for item in items]
            texts = ask(prompts, max_tokens=options.max_new_tokens, stop=options.stop)
            return texts, [len(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        limits = Limits(options.max_new_tokens, end_tokens(model, self._tokenizer), tuple(options.stop))
        written = generate(model, self._tokenizer, [held.prompts[item] for item in items], limits, options.batch_size)
        return [answer_text(self._tokenizer, tokens, options.stop) for tokens in written], list(map(len, written))

    def _read(self, task: str, path: Path, limit: int | None) -> _Task:
        lines = read_lines(path, task, self._flaw)
        prompts, references = [], []
        for number, line in enumerate(lines, start=1):
            where = f"task {task}: {path}, line {number}"
            prompt, reference = self._tokens(line)
            if not prompt or (reference and reference.num_scored < 1):
                raise DataError(f"{where}: expected at least one token in prompt and answer, found none")
            longest = max(len(prompt) + self._options.max_new_tokens, len(reference.tokens) if reference else 0)
            if limit is not None and longest > limit:
                raise DataError(
                    f"{where}: {len(prompt)} tokens and {longest - len(prompt)} for the answer, but the model takes "
                    f"{limit}; cut it or lower max_new_tokens"
                )
            prompts.append(prompt)
            references += [reference] if reference else []
        return _Task(tuple(lines), tuple(prompts), tuple(references))

    def _tokens(self, line: Mapping[str, Any]) -> tuple[tuple[int, ...], TokenSequence | None]:
        """Return the prompt's tokens and, where there is an answer, both as a sequence with the answer scored."""
        if not self._options.chat:
            prompt = text_tokens(self._tokenizer, line["prompt"])
            return prompt, continuation(self._tokenizer, line["prompt"], line["answer"]) if "answer" in line else None
        messages = [{"role": "user", "content": line["prompt"]}]
        prompt = tuple(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if "answer" not in line:
            return prompt, None
        answer = self._tokenizer(line["answer"], add_special_tokens=False)["input_ids"]
        return prompt, TokenSequence((*prompt, *answer), len(answer))

    def _flaw(self, line: Mapping[str, Any]) -> str | None:
        known, judge = {"source", "prompt", "answer"}, self._options.judge
        if "answer" not in line and isinstance(judge, ModelJudgeOptions) and judge.needs_reference:
            return "expected an answer, as the judge's prompt has a {reference}; found none"
        if "prompt" not in line or (line.keys() - known and self._judge is None):
            return f"expected source, prompt and, if there is one, answer; found {', '.join(sorted(line))}"
        for key in ("prompt", "answer"):
            if not isinstance(line.get(key, ""), str):
                return f"expected {key} to be a string, found {line[key]!r}"
        return None


def _make_judge(options: str | ModelJudgeOptions | None) -> Judge | None:
    if options is None:
        return None
    return FunctionJudge(options) if isinstance(options, str) else ModelJudge(options)
