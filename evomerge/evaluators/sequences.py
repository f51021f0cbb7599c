"""Token sequences through a causal language model: batches, logits where tokens are scored, shared beginnings run once.

How they are batched and laid out is told in ``layouts``. Without gradients, what sequences begin with can be run once
and its keys and values be kept: the prefix of all of them, and the context of several continuations.
Shape letters: N sequences, B rows of a batch, T tokens, V vocabulary, S places that predict a scored token, R some of
them, P scored tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluators.layouts import Batch, Inputs, Plan, TokenSequence, by_length, pad, plan_of

CACHE_BYTES = 4 * 2**30  # keys and values of a batch; where sequences are long, fewer of them make one
ROWS_IN_CACHE = 256  # of logits: a megabyte for a thousand words

Forward = tuple[list[int], Tensor, Tensor, Tensor]


def forwards(model: nn.Module, sequences: Sequence[TokenSequence], batch_size: int) -> Iterator[Forward]:
    """Yield (indices [B], float32 logits (B, T, V), the tokens that they predict (B, T), which are scored (B, T)).

    Batched by length; T goes from a batch's first scored token to its last. Differentiable in the parameters.
    """
    device = _device(model)
    for indices in by_length(sequences, batch_size):
        rows = pad([sequences[index] for index in indices])
        num_logits = rows.scored.shape[1]
        logits = _logits(model, {"input_ids": rows.tokens[:, :-1]}, num_logits)
        yield indices, logits, rows.tokens[:, -num_logits:].to(device), rows.scored.to(device)


def logprobs(
    model: nn.Module, sequences: Sequence[TokenSequence], batch_size: int, *, share_prefixes: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability (N,) of the scored tokens, nats, and whether each is the likeliest (N,).

    float64 and bool, on the CPU, in the order of the sequences. share_prefixes: run what sequences begin with once,
    where that saves tokens and the model can go on from it; results then move by a rounding of the model's dtype.
    """
    total = torch.zeros(len(sequences), dtype=torch.float64)
    greedy = torch.ones(len(sequences), dtype=torch.bool)
    with torch.inference_mode():
        plan = plan_of(tuple(sequences), share_prefixes)
        if plan.prefix is not None and not continues_exactly(model, sequences):
            plan = plan_of(tuple(sequences), False)
        for batch, logits in _run(model, plan, batch_size):
            logp_P, is_likeliest_P = _of_tokens(logits.flatten(0, 1), batch)
            total.index_add_(0, batch.sequence, logp_P.double())
            greedy[batch.sequence[~is_likeliest_P]] = False
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


def scored_logits(model: nn.Module, sequences: Sequence[TokenSequence], batch_size: int) -> list[Tensor]:
    """Return each sequence's float32 logits where it is scored, (tokens, V), differentiable in the parameters."""
    rows: dict[int, Tensor] = {}
    for indices, logits, _, scored in forwards(model, sequences, batch_size):
        rows |= {index: logits[row, scored[row]] for row, index in enumerate(indices)}
    return [rows[index] for index in range(len(sequences))]


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
    if by_place or not {"position_ids", "attention_mask", "past_key_values"} <= _arguments(model.__class__):
        return False
    widest = 2 * max(len(sequence.tokens) for sequence in sequences)  # of a batch: beginnings and ends padded apart
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and widest < layer.sliding_window)
        for layer in DynamicCache(config=config).layers
    )


def _run(model: Any, plan: Plan, batch_size: int) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its logits (B, T, V): the common prefix run once, each head once a batch, then the rows."""
    from transformers.cache_utils import DynamicCache

    if plan.prefix is None:
        for batch in plan.batches(batch_size):
            yield batch, _logits(model, batch.inputs, batch.num_logits)
        return
    device = _device(model)
    empty = DynamicCache(config=model.config)
    first = _copied(empty)
    tokens = torch.tensor([plan.prefix or (0,)])
    _logits(model, {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1])[None]}, 1, first)
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in first.layers)
    limit = max(1, min(batch_size, CACHE_BYTES // (num_bytes // max(len(plan.prefix), 1) * plan.longest)))
    for batch in plan.batches(limit):
        assert batch.heads is not None
        cache = _copied(first if plan.prefix else empty)
        cache.batch_repeat_interleave(batch.heads.num)
        if batch.heads.inputs:
            _logits(model, batch.heads.inputs, 1, cache)
        _hand_out(cache, batch.heads.of_row.to(device))
        yield batch, _logits(model, batch.inputs, batch.num_logits, cache)


def _copied(cache: Any) -> Any:
    """Return a cache that can go on by itself; its tensors are shared, as layers replace theirs and do not write."""
    twin = copy(cache)
    twin.layers = [copy(layer) for layer in cache.layers]
    return twin


def _hand_out(cache: Any, of_row: Tensor) -> None:
    """Let each layer hand the rows of the last forward the keys and values of their heads, and keep none of them.

    So no more than one layer of a batch is laid out at a time, in memory that is at hand.
    """

    def handing_out(layer: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def update(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return _joined(layer.keys, of_row, keys), _joined(layer.values, of_row, values)

        return update

    for layer in cache.layers:
        layer.update = handing_out(layer)


def _joined(kept: Tensor | None, of_row: Tensor, further: Tensor) -> Tensor:
    """Return keys or values of rows (B, heads, T, size): those kept of each row's head, (H, ...), and further ones."""
    if kept is None:
        return further
    return torch.cat([kept.index_select(0, of_row.to(kept.device)), further], dim=-2)  # layers may lie on other devices


def _logits(model: Any, inputs: Inputs, num_logits: int, cache: Any = None) -> Tensor:
    """Run a forward, going on from a cache, if any, that takes its keys and values; return its last float32 logits."""
    device = _device(model)
    fed: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in inputs.items()}
    if cache is not None:
        fed["past_key_values"] = cache
    if "logits_to_keep" in _arguments(model.__class__):
        fed["logits_to_keep"] = num_logits
    output = model(**fed, use_cache=cache is not None)
    return output.logits[:, -num_logits:].float()  # type: ignore[no-any-return]


@lru_cache(8)
def _arguments(kind: type) -> frozenset[str]:
    """Return what a class of models takes: asking Python takes as long as moving a batch."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _of_tokens(logits_NV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability (P,) of a batch's scored tokens, and whether each is the first of the likeliest (P,).

    On the CPU. There the rows of logits go through in pieces that stay in its cache, which takes a third of the time.
    """
    device, on_cpu = logits_NV.device, logits_NV.device.type == "cpu"
    scored_S, place_P, token_P = (part.to(device) for part in (batch.scored, batch.place, batch.token))
    logp_P, is_likeliest_P = logits_NV.new_empty(len(place_P)), torch.empty_like(place_P, dtype=torch.bool)
    starts = range(0, len(scored_S), ROWS_IN_CACHE if on_cpu else len(scored_S))
    ends = torch.searchsorted(batch.place, torch.tensor([*starts[1:], len(scored_S)])).tolist()
    for start, low, high in zip(starts, [0, *ends], ends, strict=False):
        rows_RV = logits_NV.index_select(0, scored_S[start : start + starts.step])
        row, token = place_P[low:high] - start, token_P[low:high]
        # numpy's search for the largest takes a fifth of torch's time
        best_R = torch.from_numpy(rows_RV.numpy().argmax(-1)) if on_cpu else rows_RV.argmax(-1)
        logp_P[low:high] = rows_RV.log_softmax(-1)[row, token]
        is_likeliest_P[low:high] = best_R[row] == token
    return logp_P.cpu(), is_likeliest_P.cpu()
