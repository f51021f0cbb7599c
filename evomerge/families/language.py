"""What the two language families share: a small Llama, rows of tokens with a mask, and scores of held-out items.

Every score comes from one forward pass per row: the logits at the positions whose next token counts. Greedy decoding
reproduces an answer exactly when each of its tokens is the most likely one after those before it, so exact match needs
no generation.

Shapes: R rows, T tokens of the longest row, padded on the right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.families.built import Scores
from evomerge.families.recipes import OrdersRecipe, TextRecipe
from evomerge.families.training import State

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN)  # ids 0, 1, 2
PAD_ID, EOS_ID = 0, 1
ROWS_A_FORWARD = 64

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Token rows: ids (R, T), and counts (R, T), true where the token is predicted and counted."""

    ids: Tensor
    counts: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        """Return the mean cross-entropy of the counted tokens, in nats."""
        log_likelihoods, _ = _predictions(model, self.ids)
        return -log_likelihoods[self.counts[:, 1:]].mean()


def small_llama(recipe: TextRecipe | OrdersRecipe, vocabulary: int, tied: bool, positions: int) -> LlamaForCausalLM:
    """Return a fresh Llama of the recipe's size, initialised from torch's default generator."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        max_position_embeddings=positions,
        initializer_range=0.05,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def wrap_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer that transformers saves and loads; it adds no special tokens of its own accord."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def save_checkpoint(folder: Path, name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save the base or an expert where a family keeps it, with the tokenizer beside it."""
    place = folder / "base" if name == "base" else folder / "experts" / name
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def rows_of(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> Rows:
    """Return one row a (prompt, continuation) pair; the continuation's tokens count, but never a row's first token."""
    prompts, continuations = (_token_ids(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    length = max(len(p) + len(c) for p, c in zip(prompts, continuations, strict=True))
    ids = torch.full((len(pairs), length), PAD_ID)
    counts = torch.zeros((len(pairs), length), dtype=torch.bool)
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        stop = len(prompt) + len(continuation)
        ids[row, :stop] = torch.tensor(prompt + continuation)
        counts[row, max(1, len(prompt)) : stop] = True
    return Rows(ids, counts)


def score_states(
    model: nn.Module,
    states: Mapping[str, State],
    tokenizer: PreTrainedTokenizerFast,
    items: Mapping[str, tuple[str, Sequence[Item]]],
) -> Scores:
    """Return the score of each state on each task; ``items`` maps a task to its metric and its items."""
    scores: Scores = {}
    for name, state in states.items():
        model.load_state_dict(state)
        scores[name] = {
            task: round(METRICS[metric](model, tokenizer, rows), 4) for task, (metric, rows) in items.items()
        }
    return scores


def mean_loss(model: nn.Module, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> float:
    """Return the mean over items of the mean loss of an item's tokens, in nats."""
    rows = rows_of(tokenizer, [(item.get("prompt", ""), item.get("answer", item.get("text"))) for item in items])
    log_likelihoods, _ = _score(model, rows)
    return -(log_likelihoods.sum(1) / rows.counts.sum(1)).mean().item()


def exact_match(model: nn.Module, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> float:
    """Return the fraction of items whose answer greedy decoding reproduces."""
    rows = rows_of(tokenizer, [(item["prompt"], item["answer"]) for item in items])
    _, misses = _score(model, rows)
    return (misses == 0).float().mean().item()


def choice_accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> float:
    """Return the fraction of items whose right choice has the highest log-likelihood."""
    pairs = [(item["prompt"], choice) for item in items for choice in item["choices"]]
    log_likelihoods, _ = _score(model, rows_of(tokenizer, pairs))
    totals = log_likelihoods.sum(1).view(len(items), -1)
    return (totals.argmax(1) == torch.tensor([item["gold"] for item in items])).float().mean().item()


METRICS: dict[str, Callable[[nn.Module, PreTrainedTokenizerFast, Sequence[Item]], float]] = {
    "loss": mean_loss,
    "exact_match": exact_match,
    "accuracy": choice_accuracy,
}


def _token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def _predictions(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every token but the first, its log-likelihood (R, T-1) and whether it is the most likely one.

    Padding stands on the right, where a causal model does not see it, so no attention mask is needed.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view_as(targets), logits.argmax(-1) == targets


def _score(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return log-likelihoods (R, T-1), zero where not counted, and the number of counted misses (R,)."""
    log_likelihoods = torch.zeros(len(rows.ids), rows.ids.shape[1] - 1)
    misses = torch.zeros(len(rows.ids), dtype=torch.long)
    lengths = (rows.ids != PAD_ID).sum(1)
    with torch.inference_mode():
        for picked in torch.split(lengths.argsort(stable=True), ROWS_A_FORWARD):  # like lengths together: less padding
            length = int(lengths[picked].max())
            ids, counts = rows.ids[picked, :length], rows.counts[picked, 1:length]
            values, hits = _predictions(model, ids)
            log_likelihoods[picked, : length - 1] = values * counts
            misses[picked] = (~hits & counts).sum(1)
    return log_likelihoods, misses
