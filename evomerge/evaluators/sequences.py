"""Token sequences through a causal language model: batches, logits where tokens are scored, shared beginnings run once.

A sequence is a context and a continuation whose tokens are scored. Sequences are padded on the right, where a causal
model never looks. Without gradients, what sequences begin with can be run once and its keys and values be kept: the
prefix of all of them (a few-shot prompt), and the context of several continuations (the choices of an item).
Shape letters: N sequences, B rows of a batch, T tokens, V vocabulary.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

CACHE_BYTES = 4 * 2**30  # keys and values of a batch; where sequences are long, fewer of them make one
ROWS_IN_CACHE = 256  # of logits: a megabyte for a thousand words
NUM_LAYOUTS = 256  # of batches of tokens that are kept: all candidates are asked the same
WORTHWHILE = 0.8  # of the tokens of plain forwards: two forwards with a cache between them cost more than their tokens

Tokens = tuple[int, ...]
Forward = tuple[list[int], Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Tokens, and how many at their end are scored: at least one, and never the first token."""

    tokens: Tokens
    num_scored: int


def forwards(model: nn.Module, sequences: Sequence[TokenSequence], batch_size: int) -> Iterator[Forward]:
    """Yield (indices [B], float32 logits (B, T, V), the tokens that they predict (B, T), which are scored (B, T)).

    Batched by length; T goes from a batch's first scored token to its last. Differentiable in the parameters.
    """
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        yield indices, *_forward(model, [sequences[index] for index in indices], {"use_cache": False})


def logprobs(
    model: nn.Module, sequences: Sequence[TokenSequence], batch_size: int, *, share_prefixes: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability (N,) of the scored tokens, nats, and whether each is the likeliest (N,).

    float64 and bool, on the CPU, in the order of the sequences. share_prefixes: run what sequences begin with once,
    where that saves tokens and the model can go on from it; results then move by a rounding of the model's dtype.
    """
    total = torch.zeros(len(sequences), dtype=torch.float64)
    greedy = torch.zeros(len(sequences), dtype=torch.bool)
    rows = _alike(tuple(sequences))
    runs = [sequences[row[0]] for row in rows]
    heads = _heads(runs) if share_prefixes else None
    with torch.inference_mode():
        if heads is not None and continues_exactly(model, runs):
            batches = _shared_forwards(model, runs, heads, batch_size)
        else:
            batches = forwards(model, runs, batch_size)
        for batch, logits, targets, scored in batches:
            pairs = [(row, index) for row, run in enumerate(batch) for index in rows[run]]
            indices, row_B = [index for _, index in pairs], targets.new_tensor([row for row, _ in pairs])
            targets_BT, scored_BT = _of_each(targets, scored, row_B, [sequences[index] for index in indices])
            place_BT = (scored.flatten().cumsum(0) - 1).view(scored.shape)[row_B]
            logp_BT, is_likeliest_BT = torch.zeros_like(scored_BT, dtype=torch.float32), ~scored_BT
            logp_BT[scored_BT], is_likeliest_BT[scored_BT] = _of_tokens(
                logits.flatten(0, 1), scored.flatten().nonzero()[:, 0], place_BT[scored_BT], targets_BT[scored_BT]
            )
            total[indices] = logp_BT.double().sum(1).cpu()
            greedy[indices] = is_likeliest_BT.all(1).cpu()
    return total, greedy


def mean_loss(model: nn.Module, sequences: Sequence[TokenSequence], batch_size: int, name: str) -> Tensor:
    """Return the mean over sequences of a token's mean loss, nats, differentiable in the parameters.

    ``ce``: minus the log-probability of what is scored; ``entropy``: of the predictions where it stands.
    """
    sums = []
    for _, logits, targets, scored in forwards(model, sequences, batch_size):
        logp = logits.log_softmax(-1)
        per_token = -logp.gather(-1, targets[..., None])[..., 0] if name == "ce" else -(logp.exp() * logp).sum(-1)
        sums.append(((per_token * scored).sum(1) / scored.sum(1)).sum())
    return torch.stack(sums).sum() / len(sequences)


@lru_cache(NUM_LAYOUTS)
def _alike(sequences: tuple[TokenSequence, ...]) -> list[list[int]]:
    """Return the indices of sequences that one row answers, as only their last tokens differ; most scored comes first.

    Such are choices of one token, and equal sequences, which so score equal to the last bit.
    """
    rows: dict[Tokens, list[int]] = {}
    for index, sequence in enumerate(sequences):
        rows.setdefault(sequence.tokens[:-1], []).append(index)
    return [sorted(row, key=lambda index: -sequences[index].num_scored) for row in rows.values()]


def _of_each(
    targets: Tensor, scored: Tensor, rows: Tensor, sequences: Sequence[TokenSequence]
) -> tuple[Tensor, Tensor]:
    """Return the tokens to be predicted and which are scored, (B, T), of sequences that are answered by given rows."""
    places = torch.arange(targets.shape[1], device=targets.device)
    last = (places * scored).amax(1)[rows]
    targets, behind = targets[rows], last[:, None] - places
    targets[torch.arange(len(rows), device=rows.device), last] = targets.new_tensor(
        [sequence.tokens[-1] for sequence in sequences]
    )
    counts = targets.new_tensor([sequence.num_scored for sequence in sequences])
    return targets, (behind >= 0) & (behind < counts[:, None])


def _of_tokens(logits_NV: Tensor, scored_S: Tensor, place_P: Tensor, tokens_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability (P,) of tokens, and whether each is the first of the likeliest (P,).

    scored_S: the rows of the logits that predict any; place_P: which of those predicts a token. On a CPU the rows go
    through in pieces that stay in its cache, which takes a third of the time.
    """
    logp_P, is_likeliest_P = logits_NV.new_empty(len(place_P)), torch.empty_like(place_P, dtype=torch.bool)
    on_cpu = logits_NV.device.type == "cpu"
    size = ROWS_IN_CACHE if on_cpu else max(len(scored_S), 1)
    starts = range(0, len(scored_S), size)
    order_P = place_P.argsort()
    ends = torch.searchsorted(place_P[order_P], torch.tensor([*starts[1:], len(scored_S)], device=place_P.device))
    for start, low, high in zip(starts, [0, *ends.tolist()], ends.tolist(), strict=False):
        rows_RV, pairs = logits_NV.index_select(0, scored_S[start : start + size]), order_P[low:high]
        row, token = place_P[pairs] - start, tokens_P[pairs]
        # numpy's search for the largest takes a fifth of torch's time
        best_R = torch.from_numpy(rows_RV.numpy().argmax(-1)) if on_cpu else rows_RV.argmax(-1)
        logp_P[pairs] = rows_RV.log_softmax(-1)[row, token]
        is_likeliest_P[pairs] = best_R[row] == token
    return logp_P, is_likeliest_P


def continues_exactly(model: Any, sequences: Sequence[TokenSequence]) -> bool:
    """Tell whether the model can go on from kept keys and values as if it had seen the tokens in one go.

    Its class must take positions, a mask and a cache, and each of its layers keep the keys and values of all tokens:
    no recurrent state, nothing compressed, no attention window that is shorter than the sequences. Models that go by
    the place in the row mostly take no positions; those that do (ALiBi in Falcon, the windows of GPT-Neo, encoders such
    as RoBERTa used as decoders) are known by their configuration.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    by_place = any(getattr(config, key, False) for key in ("alibi", "window_size", "is_decoder"))
    takes = inspect.signature(model.forward).parameters.keys()
    if by_place or not {"position_ids", "attention_mask", "past_key_values"} <= takes:
        return False
    widest = 2 * max(len(sequence.tokens) for sequence in sequences)  # of a batch: beginnings and ends padded apart
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and widest < layer.sliding_window)
        for layer in DynamicCache(config=config).layers
    )


def _heads(sequences: Sequence[TokenSequence]) -> list[Tokens] | None:
    """Return what each sequence begins with that is better run once, or None if plain forwards are as good.

    That is its context but for the last token, which predicts the first scored one, or only the prefix of them all.
    """
    contexts = [sequence.tokens[: -sequence.num_scored - 1] for sequence in sequences]
    prefix = _common_prefix(contexts)
    all_tokens = sum(len(sequence.tokens) for sequence in sequences)
    with_contexts = _num_run(sequences, contexts, len(prefix))
    with_prefix = _num_run(sequences, [prefix] * len(sequences), len(prefix))
    if with_contexts < WORTHWHILE * min(with_prefix, all_tokens):
        return contexts
    return [prefix] * len(sequences) if with_prefix < WORTHWHILE * all_tokens else None


def _common_prefix(rows: Sequence[Tokens]) -> Tokens:
    """Return what all rows begin with: what the first and the last in their order have in common."""
    first, last = min(rows, default=()), max(rows, default=())
    return tuple(token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _num_run(sequences: Sequence[TokenSequence], heads: Sequence[Tokens], num_prefix: int) -> int:
    """Count the tokens that go through the model."""
    tails = sum(len(sequence.tokens) - len(head) for sequence, head in zip(sequences, heads, strict=True))
    return num_prefix + sum(len(head) - num_prefix for head in set(heads)) + tails


def _shared_forwards(
    model: Any, sequences: Sequence[TokenSequence], heads: Sequence[Tokens], batch_size: int
) -> Iterator[Forward]:
    """Yield what ``forwards`` does: the common prefix run once, each head once a batch, and what follows the heads."""
    from transformers.cache_utils import DynamicCache

    device = next(model.parameters()).device
    prefix = _common_prefix(heads)
    first = DynamicCache(config=model.config)
    _extend(model, first, torch.ones((1, 0), dtype=torch.bool, device=device), [prefix or sequences[0].tokens[:1]])
    longest = max(len(sequence.tokens) for sequence in sequences)
    limit = max(1, min(batch_size, CACHE_BYTES // (_num_bytes(first) // max(len(prefix), 1) * longest)))
    for indices in _batches(sequences, heads, limit):
        rows = {head: row for row, head in enumerate(dict.fromkeys(heads[index] for index in indices))}
        cache = copy.deepcopy(first) if prefix else DynamicCache(config=model.config)
        cache.batch_repeat_interleave(len(rows))
        mask = torch.ones((len(rows), len(prefix)), dtype=torch.bool, device=device)
        mask = _extend(model, cache, mask, [head[len(prefix) :] for head in rows])
        row_of = torch.tensor([rows[heads[index]] for index in indices], device=device)
        cache.batch_select_indices(row_of)
        tails = [
            TokenSequence(sequences[index].tokens[len(heads[index]) :], sequences[index].num_scored)
            for index in indices
        ]
        fed = torch.tensor([len(tail.tokens) - 1 for tail in tails])
        yield indices, *_forward(model, tails, _going_on(cache, mask[row_of], fed))


def _batches(sequences: Sequence[TokenSequence], heads: Sequence[Tokens], limit: int) -> Iterator[list[int]]:
    """Yield indices of at most ``limit`` sequences; sequences of one head stay together if they fit.

    By the length of what follows the head, of which there are more rows to pad than of heads.
    """
    groups: dict[Tokens, list[int]] = {}
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens)):
        groups.setdefault(heads[index], []).append(index)
    batch: list[int] = []
    for head in sorted(groups, key=lambda head: (len(sequences[groups[head][-1]].tokens) - len(head), len(head))):
        for start in range(0, len(groups[head]), limit):
            part = groups[head][start : start + limit]
            if len(batch) + len(part) > limit:
                yield batch
                batch = []
            batch += part
    yield batch


def _extend(model: Any, cache: Any, mask: Tensor, rows: Sequence[Tokens]) -> Tensor:
    """Run further tokens of each row into the cache; return which of the cache's columns hold tokens, (B, T) bool."""
    tokens, lengths = _padded(tuple(rows))
    if tokens.shape[1]:
        model(input_ids=tokens.to(mask.device), **_going_on(cache, mask, lengths), **_keeping(model, 1))
    return torch.cat([mask, (torch.arange(tokens.shape[1]) < lengths[:, None]).to(mask.device)], dim=1)


def _going_on(cache: Any, mask: Tensor, lengths: Tensor) -> dict[str, Any]:
    """Return the inputs with which a forward of so many further tokens a row goes on from a cache and skips its gaps.

    The padding after the further tokens is not masked: nothing looks at it, and it must not be left without a sight.
    """
    width = int(lengths.max())
    places = torch.arange(width).minimum((lengths[:, None] - 1).clamp(min=0)).to(mask.device)
    return {
        "past_key_values": cache,
        "attention_mask": None if bool(mask.all()) else torch.cat([mask, mask.new_ones((len(mask), width))], dim=1),
        "position_ids": mask.sum(1, keepdim=True) + places,
        "use_cache": True,
    }


def _forward(model: Any, batch: Sequence[TokenSequence], going_on: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 logits, the tokens that they predict and which of them are scored, from the first scored on."""
    tokens, ends = _padded(tuple(sequence.tokens for sequence in batch))
    starts = ends - torch.tensor([sequence.num_scored for sequence in batch])
    first = int(starts.min())
    places = torch.arange(first, tokens.shape[1])
    scored = (places >= starts[:, None]) & (places < ends[:, None])
    device = next(model.parameters()).device
    tokens, scored = tokens.to(device), scored.to(device)
    output = model(input_ids=tokens[:, :-1], **going_on, **_keeping(model, len(places)))
    return output.logits[:, -len(places) :].float(), tokens[:, first:], scored


def _keeping(model: Any, num_logits: int) -> dict[str, int]:
    """Ask for the logits of the last places only, where the model's class can be asked."""
    return {"logits_to_keep": num_logits} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@lru_cache(NUM_LAYOUTS)
@torch.inference_mode(mode=False)  # the same tensors serve searches by gradients
def _padded(rows: tuple[Tokens, ...]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T), zeros on the right, and how many each row has, (B,)."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)
    return tokens, torch.tensor([len(row) for row in rows])


def _num_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
