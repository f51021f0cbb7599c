"""How token sequences go through a causal language model, laid out as tensors: all that does not depend on its weights.

A sequence is a context and a continuation whose tokens are scored. Rows are padded on the right, where a causal model
never looks. A row answers all sequences that differ in their last token only. What sequences begin with, their head,
can be run once: the prefix of all of them (a few-shot prompt), and the context of several continuations (the choices of
an item). Layouts are kept from candidate to candidate, which are all asked the same.
Shape letters: N sequences, B rows of a batch, H heads of a batch, T tokens of a row, S places that predict a scored
token, P scored tokens of the sequences that a batch answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

KEPT_BYTES = 2**28  # of plans, beside the one that is in use
LISTED_BYTES = 128  # of a sequence: a list of its own, and a place in some others
WORTHWHILE = 0.8  # of the tokens of plain forwards: two forwards with a cache between them cost more than their tokens

Tokens = tuple[int, ...]
Inputs = dict[str, Tensor | None]
"""Arguments of a model's forward, by name."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Tokens, and how many at their end are scored: at least one, and never the first token."""

    tokens: Tokens
    num_scored: int
    _hash: int = field(init=False, repr=False, compare=False)  # sequences are looked up for every candidate

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.tokens, self.num_scored)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences padded to a rectangle.

    Shapes: tokens (B, T) int64; lengths (B,); scored (B, T'), whose T' last columns begin with the first scored token.
    """

    tokens: Tensor
    lengths: Tensor
    scored: Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """What the rows of a batch go on from, beyond the prefix.

    num: H; inputs: of a forward of them, None if they are no more than the prefix; of_row (B,): the head of each row.
    """

    num: int
    inputs: Inputs | None
    of_row: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward, and the sequences that its logits answer.

    inputs: of B rows; heads: None in plain forwards; num_logits: how many last places of a row are needed; scored (S,):
    which of these B * num_logits places predict a scored token; place, token, sequence (P,): the scored tokens, in the
    order of the places among S that predict them, and the index of the sequence of each.
    """

    inputs: Inputs
    heads: Heads | None
    num_logits: int
    scored: Tensor
    place: Tensor
    token: Tensor
    sequence: Tensor

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        tensors = [*self.inputs.values(), self.scored, self.place, self.token, self.sequence]
        if self.heads:
            tensors += [*(self.heads.inputs or {}).values(), self.heads.of_row]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Plan:
    """The batches in which sequences are run; prefix is None where plain forwards are as good as shared beginnings."""

    def __init__(self, sequences: tuple[TokenSequence, ...], share: bool) -> None:
        self._sequences = sequences
        self._rows = _alike(sequences)
        self._runs = [sequences[row[0]] for row in self._rows]
        self._head_lengths = _head_lengths(self._runs) if share else None
        self.prefix = None if self._head_lengths is None else _common_prefix(self._heads(self._head_lengths))
        self.longest = max((len(sequence.tokens) for sequence in sequences), default=0)
        self._limit = 0
        self._batches: list[Batch] = []

    @property
    def num_bytes(self) -> int:
        """Size of the batches that are kept and, about, of the lists of the sequences; not of their tokens."""
        return sum(batch.num_bytes for batch in self._batches) + LISTED_BYTES * len(self._sequences)

    def batches(self, limit: int) -> Sequence[Batch]:
        """Return batches of at most ``limit`` rows, which are kept until another limit is asked for."""
        if limit != self._limit:
            if self._head_lengths is None:
                self._batches = [self._plain(rows) for rows in by_length(self._runs, limit)]
            else:
                heads = self._heads(self._head_lengths)
                self._batches = [self._shared(rows, heads) for rows in _by_head(self._runs, heads, limit)]
            self._limit = limit
        return self._batches

    def _heads(self, lengths: Sequence[int]) -> list[Tokens]:
        return [sequence.tokens[:length] for sequence, length in zip(self._runs, lengths, strict=True)]

    def _plain(self, rows: Sequence[int]) -> Batch:
        padded = pad([self._runs[row] for row in rows])
        return self._batch(rows, padded, {"input_ids": padded.tokens[:, :-1]}, None)

    def _shared(self, rows: Sequence[int], heads: Sequence[Tokens]) -> Batch:
        """Lay out the heads of a batch behind the prefix, and what follows them."""
        assert self.prefix is not None
        number = {head: place for place, head in enumerate(dict.fromkeys(heads[row] for row in rows))}
        tokens, lengths = _padded([head[len(self.prefix) :] for head in number])
        prefix_mask = torch.ones((len(number), len(self.prefix)), dtype=torch.bool)
        mask = torch.cat([prefix_mask, torch.arange(tokens.shape[1]) < lengths[:, None]], dim=1)
        of_row = torch.tensor([number[heads[row]] for row in rows])
        inputs = _going_on(prefix_mask, tokens, lengths) if tokens.shape[1] else None
        tails = [TokenSequence(self._runs[row].tokens[len(heads[row]) :], self._runs[row].num_scored) for row in rows]
        padded = pad(tails)
        going_on = _going_on(mask[of_row], padded.tokens[:, :-1], padded.lengths - 1)
        return self._batch(rows, padded, going_on, Heads(len(number), inputs, of_row))

    def _batch(self, rows: Sequence[int], padded: Rows, inputs: Inputs, heads: Heads | None) -> Batch:
        """Find out which place predicts each scored token of the sequences that the rows answer."""
        triples, end = [], 0
        for row in rows:
            end += self._runs[row].num_scored
            for index in self._rows[row]:
                tokens = self._sequences[index].tokens[-self._sequences[index].num_scored :]
                triples += [(end - len(tokens) + number, token, index) for number, token in enumerate(tokens)]
        place, token, sequence = torch.tensor(sorted(triples)).T.contiguous().unbind()
        scored = padded.scored.flatten().nonzero()[:, 0]
        return Batch(inputs, heads, padded.scored.shape[1], scored, place, token, sequence)


_plans: dict[tuple[tuple[TokenSequence, ...], bool], Plan] = {}


def plan_of(sequences: tuple[TokenSequence, ...], share: bool) -> Plan:
    """Return the plan of sequences, a kept one where there is one.

    Plans are kept in this process, up to KEPT_BYTES and the plan that is in use; those that were not used for the
    longest time go first.
    """
    key = (sequences, share)
    plan = _plans.pop(key, None) or Plan(sequences, share)
    while sum(kept.num_bytes for kept in _plans.values()) > KEPT_BYTES:
        del _plans[next(iter(_plans))]
    _plans[key] = plan  # the last in the order of the dictionary
    return plan


def by_length(sequences: Sequence[TokenSequence], limit: int) -> list[list[int]]:
    """Return the indices of sequences in batches of similar length."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
    return [order[start : start + limit] for start in range(0, len(order), limit)]


def pad(sequences: Sequence[TokenSequence]) -> Rows:
    """Return sequences as a rectangle, zeros on the right."""
    tokens, ends = _padded([sequence.tokens for sequence in sequences])
    starts = ends - torch.tensor([sequence.num_scored for sequence in sequences])
    places = torch.arange(int(starts.min()), tokens.shape[1])
    return Rows(tokens, ends, (places >= starts[:, None]) & (places < ends[:, None]))


def _padded(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T), zeros on the right, and how many each row has, (B,)."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)
    return tokens, torch.tensor([len(row) for row in rows])


def _going_on(mask: Tensor, tokens: Tensor, lengths: Tensor) -> Inputs:
    """Return the inputs of a forward of further tokens (B, T) that skips the gaps of what is kept, a mask (B, columns).

    The padding after the further tokens is not masked: nothing looks at it, and it must not be left without a sight.
    """
    places = torch.arange(tokens.shape[1]).minimum((lengths[:, None] - 1).clamp(min=0))
    return {
        "input_ids": tokens,
        "attention_mask": None
        if bool(mask.all())
        else torch.cat([mask, torch.ones(tokens.shape, dtype=torch.bool)], dim=1),
        "position_ids": mask.sum(1, keepdim=True) + places,
    }


def _alike(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Return the indices of sequences that one row answers, as only their last tokens differ; most scored comes first.

    Such are choices of one token, and equal sequences, which so score equal to the last bit.
    """
    rows: dict[Tokens, list[int]] = {}
    for index, sequence in enumerate(sequences):
        rows.setdefault(sequence.tokens[:-1], []).append(index)
    return [sorted(row, key=lambda index: -sequences[index].num_scored) for row in rows.values()]


def _head_lengths(sequences: Sequence[TokenSequence]) -> list[int] | None:
    """Return how many first tokens of each sequence are better run once, or None if plain forwards are as good.

    That is its context but for the last token, which predicts the first scored one, or only the prefix of them all.
    """
    contexts = [sequence.tokens[: -sequence.num_scored - 1] for sequence in sequences]
    prefix = _common_prefix(contexts)
    all_tokens = sum(len(sequence.tokens) for sequence in sequences)
    with_contexts = _num_run(sequences, contexts, len(prefix))
    with_prefix = _num_run(sequences, [prefix] * len(sequences), len(prefix))
    if with_contexts < WORTHWHILE * min(with_prefix, all_tokens):
        return [len(context) for context in contexts]
    return [len(prefix)] * len(sequences) if with_prefix < WORTHWHILE * all_tokens else None


def _common_prefix(rows: Sequence[Tokens]) -> Tokens:
    """Return what all rows begin with: what the first and the last in their order have in common."""
    first, last = min(rows, default=()), max(rows, default=())
    return tuple(token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _num_run(sequences: Sequence[TokenSequence], heads: Sequence[Tokens], num_prefix: int) -> int:
    """Count the tokens that go through the model."""
    tails = sum(len(sequence.tokens) - len(head) for sequence, head in zip(sequences, heads, strict=True))
    return num_prefix + sum(len(head) - num_prefix for head in set(heads)) + tails


def _by_head(sequences: Sequence[TokenSequence], heads: Sequence[Tokens], limit: int) -> list[list[int]]:
    """Return the indices of sequences in batches; sequences of one head stay together if they fit.

    By the length of what follows the head, of which there are more rows to pad than of heads.
    """
    groups: dict[Tokens, list[int]] = {}
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens)):
        groups.setdefault(heads[index], []).append(index)
    batches: list[list[int]] = [[]]
    for head in sorted(groups, key=lambda head: (len(sequences[groups[head][-1]].tokens) - len(head), len(head))):
        for start in range(0, len(groups[head]), limit):
            part = groups[head][start : start + limit]
            if len(batches[-1]) + len(part) > limit:
                batches.append([])
            batches[-1] += part
    return batches
