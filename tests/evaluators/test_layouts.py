"""What a model is fed, and which of its logits score which token: rebuilt from the layouts, and kept within a bound."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.evaluators import layouts
from evomerge.evaluators.layouts import Batch, Plan, Tokens, TokenSequence, plan_of

FEW = st.integers(1, 3)  # few tokens, so that sequences begin alike, or are equal


@st.composite
def sequence_lists(draw: st.DrawFn) -> tuple[TokenSequence, ...]:
    prefix = tuple(draw(st.lists(FEW, max_size=6)))
    tails = draw(st.lists(st.lists(FEW, min_size=2, max_size=5), min_size=1, max_size=12))
    rows = [prefix + tuple(tail) for tail in tails]
    return tuple(TokenSequence(row, draw(st.integers(1, len(row) - 1))) for row in rows)


def some(seed: int, num: int = 8) -> tuple[TokenSequence, ...]:
    """Sequences with a long beginning in common."""
    rows = torch.randint(1, 50, (num, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(TokenSequence((*range(1, 20), *row), 3) for row in rows)


def seen(prefix: Tokens, batch: Batch, row: int, width: int) -> list[tuple[int, int]]:
    """Return (position, token) of all that a row's last of ``width`` further tokens may see, itself included."""
    fed = batch.inputs["input_ids"]
    assert fed is not None
    tokens = fed[row, :width].tolist()
    if batch.heads is None:
        return list(enumerate(tokens))
    columns, places = list(prefix), list(range(len(prefix)))
    if batch.heads.inputs:
        head = int(batch.heads.of_row[row])
        head_tokens, head_places = batch.heads.inputs["input_ids"], batch.heads.inputs["position_ids"]
        assert head_tokens is not None
        assert head_places is not None
        columns += head_tokens[head].tolist()
        places += head_places[head].tolist()
    mask, positions = batch.inputs["attention_mask"], batch.inputs["position_ids"]
    assert positions is not None
    visible = [True] * len(columns) if mask is None else mask[row, : len(columns)].tolist()
    before = [pair for pair, shown in zip(zip(places, columns, strict=True), visible, strict=True) if shown]
    return before + list(zip(positions[row, :width].tolist(), tokens, strict=True))


@settings(max_examples=100)
@given(sequences=sequence_lists(), share=st.booleans(), limit=st.integers(1, 6))
def test_each_scored_token_is_predicted_from_all_before_it(
    sequences: tuple[TokenSequence, ...], share: bool, limit: int
) -> None:
    plan = Plan(sequences, share)
    found: list[list[int]] = [[] for _ in sequences]
    for batch in plan.batches(limit):
        fed = batch.inputs["input_ids"]
        assert fed is not None
        num_rows, width = fed.shape
        assert num_rows <= limit
        for place, token, index in zip(
            batch.place.tolist(), batch.token.tolist(), batch.sequence.tolist(), strict=True
        ):
            row, column = divmod(int(batch.scored[place]), batch.num_logits)
            sequence = sequences[index]
            num_before = len(sequence.tokens) - sequence.num_scored + len(found[index])
            context = seen(plan.prefix or (), batch, row, width - batch.num_logits + column + 1)
            assert context == list(enumerate(sequence.tokens[:num_before]))
            found[index].append(token)
    assert [tuple(tokens) for tokens in found] == [part.tokens[-part.num_scored :] for part in sequences]


def test_a_plan_is_made_once_for_equal_sequences() -> None:
    plan = plan_of(some(1), True)
    assert plan_of(some(1), True) is plan
    assert plan.batches(4) is plan.batches(4)
    assert plan_of(some(1), False) is not plan
    assert plan_of(some(2), True) is not plan


def test_another_limit_makes_other_batches() -> None:
    plan = Plan(some(1), True)
    assert [len(plan.batches(limit)) for limit in (8, 3, 8)] == [1, 3, 1]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plans of equal size two fit; which was used last stays."""
    monkeypatch.setattr(layouts, "_plans", {})
    first, second = plan_of(some(1), True), plan_of(some(2), True)
    for plan in (first, second):
        plan.batches(8)
    assert first.num_bytes == second.num_bytes > 8 * 4 * 8  # of as many further tokens alone
    monkeypatch.setattr(layouts, "KEPT_BYTES", 2 * first.num_bytes)
    plan_of(some(3), True).batches(8)
    assert plan_of(some(1), True) is first
    plan_of(some(4), True).batches(8)
    assert plan_of(some(1), True) is first
    assert plan_of(some(2), True) is not second


def test_plans_that_nobody_runs_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a model that cannot go on from kept keys and values."""
    monkeypatch.setattr(layouts, "_plans", {})
    monkeypatch.setattr(layouts, "KEPT_BYTES", 3 * plan_of(some(0), True).num_bytes)
    for seed in range(1, 12):
        plan_of(some(seed), True)
    assert len(layouts._plans) == 4


def test_equal_sequences_have_one_hash() -> None:
    one, other = TokenSequence((1, 2, 3), 1), TokenSequence((1, 2, 3), 1)
    assert one == other == pickle.loads(pickle.dumps(one))
    assert len({one, other, pickle.loads(pickle.dumps(one)), TokenSequence((1, 2, 3), 2)}) == 2
