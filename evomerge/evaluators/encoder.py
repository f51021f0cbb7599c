"""Texts to vectors: tokens made once, the model's hidden states, and the pooling that the model was trained with.

Shape letters: N texts, B texts of a batch, T tokens, H hidden size.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from evomerge.errors import DataError
from evomerge.evaluators.lines import open_tokenizer, token_limit

Pooling = Literal["mean", "cls", "last"]
Tokens = npt.NDArray[np.int32]

POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
}
MODULES = {"Transformer", "Pooling", "Normalize"}
NO_LIMIT = 10**9  # tokenizers without a limit give 10^30


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer, and how hidden states become one vector a text; limit: tokens at which a text is cut."""

    tokenizer: Any
    pooling: Pooling
    limit: int | None
    batch_size: int

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Return each text's tokens, with the special ones that the tokenizer adds."""
        tokens = self.tokenizer(
            list(texts),
            truncation=self.limit is not None,
            max_length=self.limit,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [np.array(of_text, dtype=np.int32) for of_text in tokens]

    def embed(self, model: nn.Module, texts: Sequence[Tokens], *, recompute: bool = False) -> Tensor:
        """Return (N, H) float32 vectors on the model's device, differentiable in its parameters.

        recompute: of many texts; backward runs each batch again instead of keeping what it needs of all of them.
        Raises: DataError if the model has no hidden states to pool.
        """
        encoder = getattr(model, "base_model", model)  # a head for words or classes is of no use here
        by_length = np.argsort([len(tokens) for tokens in texts], kind="stable")
        parts = []
        for start in range(0, len(texts), self.batch_size):
            batch = [texts[index] for index in by_length[start : start + self.batch_size]]
            if recompute and torch.is_grad_enabled():
                # Not reentrant: the parameters' gradients arrive as one, however many batches there are.
                parts.append(checkpoint(self._embed, encoder, batch, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._embed(encoder, batch))
        return torch.cat(parts)[torch.from_numpy(np.argsort(by_length)).to(parts[0].device)]

    def _embed(self, encoder: nn.Module, batch: Sequence[Tokens]) -> Tensor:
        device = next(encoder.parameters()).device
        pad = self.tokenizer.pad_token_id or 0  # on the right, and masked
        tokens_BT = pad_sequence([torch.from_numpy(tokens) for tokens in batch], True, pad).long().to(device)
        lengths_B = torch.tensor([len(tokens) for tokens in batch], device=device)
        mask_BT = torch.arange(tokens_BT.shape[1], device=device) < lengths_B[:, None]
        without_cache = {"use_cache": False} if "use_cache" in inspect.signature(encoder.forward).parameters else {}
        output = encoder(input_ids=tokens_BT, attention_mask=mask_BT.long(), **without_cache)
        if getattr(output, "last_hidden_state", None) is None:
            raise DataError(f"{type(encoder).__name__} gives no last_hidden_state to pool; expected an encoder of text")
        hidden_BTH: Tensor = output.last_hidden_state.float()
        if self.pooling == "cls":
            return hidden_BTH[:, 0]
        if self.pooling == "last":
            return hidden_BTH[torch.arange(len(batch), device=device), lengths_B - 1]
        return hidden_BTH.masked_fill(~mask_BT[..., None], 0).sum(1) / lengths_B[:, None]


def open_encoder(base: Path, pooling: Pooling | None, max_length: int | None, batch_size: int) -> TextEncoder:
    """Return the encoder of a base; what is None is as sentence-transformers' files beside it say.

    Without such files, texts are pooled by their mean and cut where the tokenizer or the model ends.
    Raises: DataError for a base without tokenizer, files that ask for something else, or a max_length beyond the model.
    """
    tokenizer, most = open_tokenizer(base), token_limit(base)
    if max_length is not None and most is not None and max_length > most:
        raise DataError(f"max_length: {max_length} tokens, but the model takes {most}")
    usual = _read(base / "sentence_bert_config.json", {}).get("max_seq_length")
    limits = [limit for limit in (most, usual, tokenizer.model_max_length) if limit is not None and limit < NO_LIMIT]
    return TextEncoder(tokenizer, pooling or _pooling_of(base), max_length or min(limits, default=None), batch_size)


def _pooling_of(base: Path) -> Pooling:
    """Return how sentence-transformers pools this model; the mean where it says nothing.

    Its modules.json lists what follows on the hidden states; 1_Pooling/config.json names the pooling, in newer files by
    ``pooling_mode``, in older ones by one ``pooling_mode_<name>`` that is true.
    """
    modules = [str(module["type"]).rsplit(".", 1)[-1] for module in _read(base / "modules.json", [])]
    path = base / "1_Pooling" / "config.json"
    config = _read(path, {"pooling_mode": "mean"})
    named = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value
    ]
    modes = [named] if isinstance(named, str) else list(named)
    others = [f"the module {module}" for module in modules if module not in MODULES]
    others += [f"the pooling {mode}" for mode in modes if mode not in POOLINGS]
    others += ["two poolings side by side"] if len(modes) > 1 else []
    others += ["prompts left out of the pooling"] if config.get("include_prompt") is False else []
    if others or not modes:
        raise DataError(
            f"{path}: the model was made with {others[0] if others else 'no pooling'}; offered are mean, cls and last: "
            "give pooling to score with one of them nevertheless, or score with kind: callable"
        )
    return POOLINGS[modes[0]]


def _read(path: Path, default: Any) -> Any:
    """Return what a JSON file beside the base holds, or the default where there is none."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
