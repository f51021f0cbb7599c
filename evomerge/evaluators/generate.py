"""Greedy generation on the resident model: what it writes after each prompt, until it ends, is stopped or is cut.

transformers' own ``generate`` with one cache a batch that goes with the batch. Nothing of the checkpoint's
generation_config.json counts but its end tokens: sampling, penalties and forced tokens stay out, so that a model
always writes the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import DataError

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """When an answer is over: an end token, the first of the stop strings in its text, or so many tokens."""

    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens with which the model ends an answer: the tokenizer's and those of its generation_config."""
    named = getattr(model.generation_config, "eos_token_id", None)
    of_model = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*of_model, tokenizer.eos_token_id) if token is not None)


def generate(model: Any, tokenizer: Any, prompts: Sequence[Tokens], limits: Limits, batch_size: int) -> list[Tokens]:
    """Return the tokens written after each prompt, in the prompts' order; () where the model ends at once.

    The end token is left out; a stop string is still in (``answer_text`` cuts it off), with what its last token holds
    behind it. Prompts have at least one token; batched by length and padded on the left.
    Raises: DataError for a model whose class does not generate.
    """
    if not getattr(model, "can_generate", bool)():
        raise DataError(f"{type(model).__name__} cannot generate; expected a language model (...ForCausalLM) as base")
    answers: list[Tokens] = [()] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with torch.inference_mode(), _own_settings(model, limits):
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            written = _generate_batch(model, tokenizer, [prompts[index] for index in indices], limits)
            for index, tokens in zip(indices, written, strict=True):
                answers[index] = tokens
    return answers


def answer_text(tokenizer: Any, tokens: Tokens, stop: Sequence[str]) -> str:
    """Return the text of an answer up to the first of the stop strings, without special tokens."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text[: min((place for term in stop if (place := text.find(term)) >= 0), default=len(text))]


@contextmanager
def _own_settings(model: Any, limits: Limits) -> Iterator[None]:
    """Let ``generate`` see only our settings: it fills what a call leaves open from the model's."""
    from transformers import GenerationConfig

    held = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=limits.max_new_tokens,
        eos_token_id=sorted(limits.end_tokens) or None,
        pad_token_id=0,
    )
    try:
        yield
    finally:
        model.generation_config = held


def _generate_batch(model: Any, tokenizer: Any, prompts: Sequence[Tokens], limits: Limits) -> list[Tokens]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    stops = _Stops(tokenizer, limits, width, len(prompts))
    written = model.generate(input_ids=tokens, attention_mask=mask, stopping_criteria=[stops])[:, width:].tolist()
    return [_answer(row, length, limits) for row, length in zip(written, stops.lengths, strict=True)]


def _answer(row: list[int], length: int | None, limits: Limits) -> Tokens:
    row = row[:length]
    ends = [place for place, token in enumerate(row) if token in limits.end_tokens]
    return tuple(row[: ends[0]] if ends else row)


class _Stops:
    """Stops a row once its text holds a stop string, and notes how many tokens it took."""

    def __init__(self, tokenizer: Any, limits: Limits, num_prompt: int, num_rows: int) -> None:
        self._tokenizer, self._stop, self._num_prompt = tokenizer, limits.stop, num_prompt
        # A token holds a byte of the text at least; decoding is right only some tokens behind where it begins.
        self._num_back = max((len(term.encode()) for term in limits.stop), default=0) + 8
        self.lengths: list[int | None] = [None] * num_rows

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        written = input_ids[:, self._num_prompt :]
        if self._stop:
            texts = self._tokenizer.batch_decode(written[:, -self._num_back :])
            for row, text in enumerate(texts):
                if self.lengths[row] is None and any(term in text for term in self._stop):
                    self.lengths[row] = written.shape[1]
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)
