"""What lm-eval would ask of a model, as tokens: its own tokenization for Hugging Face models, noted, not run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import DataError
from evomerge.evaluators.generate import Limits, end_tokens
from evomerge.evaluators.layouts import Tokens, TokenSequence
from evomerge.evaluators.lines import open_tokenizer

GREEDY = frozenset({"do_sample", "temperature", "top_p", "top_k"})  # none of these counts where nothing is sampled


@dataclass(frozen=True, slots=True)
class Request:
    """One request of lm-eval (its Instance), tokenized.

    sequences: one to score, or the windows of a text; an answer to write has a prompt and limits instead.
    """

    instance: Any
    sequences: tuple[TokenSequence, ...] = ()
    prompt: Tokens = ()
    limits: Limits | None = None

    @property
    def content(self) -> list[Any]:
        """All that is asked, as JSON."""
        limits = self.limits
        ends = [limits.max_new_tokens, sorted(limits.end_tokens), limits.stop] if limits else None
        return [[[sequence.tokens, sequence.num_scored] for sequence in self.sequences], self.prompt, ends]


class Harness:
    """lm-eval's model class for Hugging Face checkpoints without a model: it tokenizes and cuts as on a real run.

    Raises: DataError if lm-eval is not installed, or the base has no tokenizer or is no causal language model.
    """

    def __init__(self, base: Path) -> None:
        from transformers import AutoConfig, GenerationConfig

        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise DataError(
                f"evaluation.kind: lm_eval needs the lm-eval package, and {error.name} is not installed; "
                "pip install 'evomerge[lm-eval]'"
            ) from error
        tokenizer = open_tokenizer(base)
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        stand_in = SimpleNamespace(config=config, device=torch.device("cpu"), name_or_path=str(base))
        self.lm: Any = HFLM(stand_in, tokenizer=tokenizer, batch_size=1)
        if self.lm.backend != "causal":
            raise DataError(f"{base}: expected a causal language model, found model_type {config.model_type!r}")
        self.lm._loglikelihood_tokens = self._note_pairs
        self.lm._model_generate = self._note_prompt
        try:
            settings = GenerationConfig.from_pretrained(base, local_files_only=True)
        except OSError:  # the file is optional
            settings = GenerationConfig.from_model_config(config)
        self._ends = end_tokens(SimpleNamespace(generation_config=settings), tokenizer)
        self._noted = Request(None)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.lm.tokenizer

    def request(self, instance: Any) -> Request:
        """Tokenize a request of any kind. Raises: DataError if this model cannot be asked."""
        self._noted = Request(instance)
        getattr(self.lm, instance.request_type)([instance], disable_tqdm=True)
        return self._noted

    def _note_pairs(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        """Stand in for lm-eval's forward over pairs of context and continuation."""
        limit = self.lm.max_length
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= limit:
                raise DataError(
                    f"expected 1 to {limit} tokens to score, as many as the model takes, found {len(continuation)}"
                )
            sequence = TokenSequence(tuple((context + continuation)[-limit - 1 :]), len(continuation))
            self._noted = replace(self._noted, sequences=(*self._noted.sequences, sequence))
        return [(0.0, False)] * len(requests)

    def _note_prompt(
        self, *, context: Tensor, attention_mask: Tensor, stop: list[str], max_length: int, **settings: Any
    ) -> Tensor:
        """Stand in for lm-eval's call of ``generate``. Raises: DataError for anything but plain greedy decoding."""
        assert bool(attention_mask.all())  # one prompt, no padding
        if not context.numel():
            raise DataError("expected prompts of at least one token, found an empty one")
        if settings.get("do_sample"):
            raise DataError(
                "its generation_kwargs ask for sampling, whose scores are not repeatable; "
                "make it greedy with gen_kwargs: {do_sample: false, temperature: 0}"
            )
        if unknown := sorted(settings.keys() - GREEDY):
            raise DataError(f"its generation_kwargs ask for {', '.join(unknown)}; only greedy decoding is known here")
        limits = Limits(max_length - context.shape[1], self._ends, tuple(term for term in stop if term))
        self._noted = replace(self._noted, prompt=tuple(context[0].tolist()), limits=limits)
        return context
