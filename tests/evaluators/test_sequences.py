"""Batches, scored tokens, and beginnings that are run once, on real tiny models of many architectures."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NUM_WORDS, tiny
from torch.nn.functional import log_softmax

from evomerge.evaluators import layouts
from evomerge.evaluators import sequences as module
from evomerge.evaluators.layouts import TokenSequence
from evomerge.evaluators.sequences import continues_exactly, forwards, logprobs

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHARING = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "opt")


def tokens(rng: np.random.Generator, num: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(1, NUM_WORDS, num))


def choices(seed: int, *, num_prefix: int = 10, num_items: int = 5) -> list[TokenSequence]:
    """Items with a few choices of several lengths behind one context, and one prefix before them all."""
    rng = np.random.default_rng(seed)
    prefix, sequences = tokens(rng, num_prefix), []
    for _ in range(num_items):
        context = prefix + tokens(rng, int(rng.integers(1, 12)))
        for _ in range(int(rng.integers(1, 5))):
            answer = tokens(rng, int(rng.integers(1, 6)))
            sequences.append(TokenSequence(context + answer, len(answer)))
    order = rng.permutation(len(sequences))
    return [sequences[index] for index in order]


def few_shot(seed: int) -> list[TokenSequence]:
    """Sequences with nothing in common but a long prefix."""
    rng = np.random.default_rng(seed)
    prefix = tokens(rng, 20)
    return [TokenSequence(prefix + tokens(rng, 3 + number), 1 + number % 3) for number in range(9)]


def one_by_one(model: Any, sequences: list[TokenSequence]) -> tuple[list[float], list[bool]]:
    """Log-probabilities without batches, padding or a cache."""
    sums, greedy = [], []
    for sequence in sequences:
        row = torch.tensor([sequence.tokens])
        with torch.no_grad():
            logp = log_softmax(model(input_ids=row).logits[0, :-1].double(), -1)[-sequence.num_scored :]
        scored = row[0, -sequence.num_scored :]
        sums.append(float(logp.gather(-1, scored[:, None]).sum()))
        greedy.append(bool((logp.argmax(-1) == scored).all()))
    return sums, greedy


class Calls:
    """Counts the tokens that go through a model and the logits it makes."""

    def __init__(self, model: Any) -> None:
        self.tokens = self.logits = self.rows = 0
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, _model: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.tokens += kwargs["input_ids"].numel()
        self.rows = max(self.rows, len(kwargs["input_ids"]))
        self.logits += output.logits[..., 0].numel()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share whatever there is to share, saving or not, and keep no plan that was made so."""
    monkeypatch.setattr(layouts, "WORTHWHILE", 100.0)
    monkeypatch.setattr(layouts, "_plans", {})


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.usefixtures("always")
def test_shared_beginnings_change_nothing(kind: str) -> None:
    model = tiny(kind)
    for sequences, batch_size in ((choices(1), 6), (choices(2, num_prefix=0), 6), (few_shot(3), 4), (choices(4), 1)):
        assert continues_exactly(model, sequences)
        expected, exact = one_by_one(model, sequences)
        assert np.std(expected) > 1, "equal log-probabilities would prove nothing"
        for share in (False, True):
            total, greedy = logprobs(model, sequences, batch_size, share_prefixes=share)
            np.testing.assert_allclose(total.numpy(), expected, **CLOSE)
            assert greedy.tolist() == exact


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), num_prefix=st.integers(0, 15), batch_size=st.integers(1, 9))
def test_any_items_score_as_one_by_one(seed: int, num_prefix: int, batch_size: int) -> None:
    model = LLAMA
    sequences = choices(seed, num_prefix=num_prefix)
    expected, exact = one_by_one(model, sequences)
    total, greedy = logprobs(model, sequences, batch_size)
    np.testing.assert_allclose(total.numpy(), expected, **CLOSE)
    assert greedy.tolist() == exact


LLAMA = tiny("llama")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mamba", {"state_size": 4}),
        ("bloom", {}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
        ("roberta", {"is_decoder": True}),
        ("falcon", {"alibi": True, "num_kv_heads": 2}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
    ],
)
@pytest.mark.usefixtures("always")
def test_a_model_that_cannot_go_on_exactly_runs_all_of_it(kind: str, changes: dict[str, Any]) -> None:
    model, sequences = tiny(kind, **changes), choices(1)
    assert not continues_exactly(model, sequences)
    expected, exact = one_by_one(model, sequences)
    total, greedy = logprobs(model, sequences, 6)
    np.testing.assert_allclose(total.numpy(), expected, **CLOSE)
    assert greedy.tolist() == exact


def test_a_window_that_holds_all_is_no_obstacle() -> None:
    assert continues_exactly(tiny("mistral", sliding_window=200), choices(1))


def test_what_is_shared_is_run_once() -> None:
    """Six items of four choices: the tokens of the contexts once, those of the choices each."""
    rng = np.random.default_rng(0)
    prefix = tokens(rng, 20)
    contexts = [prefix + tokens(rng, 8) for _ in range(6)]
    sequences = [TokenSequence(context + tokens(rng, 3), 3) for context in contexts for _ in range(4)]
    model = tiny("llama")
    shared = Calls(model)
    logprobs(model, sequences, 24)
    assert shared.tokens == 20 + 6 * 7 + 24 * 3  # a context's last token predicts the first of each choice
    assert shared.rows == 24
    model = tiny("llama")
    plain = Calls(model)
    logprobs(model, sequences, 24, share_prefixes=False)
    assert plain.tokens == 24 * 30
    assert plain.logits == 24 * 3


@pytest.mark.parametrize("share", [False, True])
def test_choices_of_one_token_are_answered_by_one_row(share: bool) -> None:
    """And equal sequences, of which more or fewer tokens may be scored."""
    rng = np.random.default_rng(0)
    contexts = [tokens(rng, 12) for _ in range(6)]
    sequences = [TokenSequence((*context, last), 1) for context in contexts for last in (3, 8, 5, 7)]
    sequences += [
        TokenSequence((*context, last), scored) for context in contexts[:3] for last, scored in ((8, 1), (9, 4))
    ]
    model = tiny("llama")
    calls = Calls(model)
    total, greedy = logprobs(model, sequences, 4, share_prefixes=share)
    assert calls.tokens == 6 * 12
    expected, exact = one_by_one(model, sequences)
    np.testing.assert_allclose(total.numpy(), expected, **CLOSE)
    assert greedy.tolist() == exact
    assert [float(total[4 * n + 1]) for n in range(3)] == [float(total[24 + 2 * n]) for n in range(3)]


@pytest.mark.parametrize("share", [False, True])
def test_layouts_that_are_kept_hold_nothing_of_a_model(share: bool) -> None:
    sequences = choices(6)
    models = [tiny("llama"), tiny("gpt2"), tiny("llama", num_hidden_layers=1), tiny("llama")]
    totals = [logprobs(model, sequences, 6, share_prefixes=share)[0] for model in models]
    for model, total in zip(models, totals, strict=True):
        np.testing.assert_allclose(total.numpy(), one_by_one(model, sequences)[0], **CLOSE)
    assert torch.equal(totals[0], totals[3])
    assert len({float(total[0]) for total in totals}) == 3


def test_sharing_that_saves_little_is_left() -> None:
    rng = np.random.default_rng(0)
    sequences = [TokenSequence((5, *tokens(rng, 12)), 12) for _ in range(8)]
    model = tiny("llama")
    calls = Calls(model)
    logprobs(model, sequences, 8)
    assert calls.tokens == 8 * 12


def test_a_batch_holds_no_more_than_its_size_nor_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = few_shot(0)
    for limit, rows in ((module.CACHE_BYTES, 4), (1, 1)):
        monkeypatch.setattr(module, "CACHE_BYTES", limit)
        model = tiny("llama")
        calls = Calls(model)
        logprobs(model, sequences, 4)
        assert calls.rows == rows


def test_forwards_hold_the_scored_tokens_and_no_more() -> None:
    model, sequences = tiny("llama"), choices(4)
    seen = []
    for indices, logits, targets, scored in forwards(model, sequences, 4):
        assert logits.dtype == torch.float32
        assert logits.shape[:2] == targets.shape == scored.shape
        assert logits.shape[1] <= max(len(sequences[i].tokens) for i in indices) - 1
        for row, index in enumerate(indices):
            sequence = sequences[index]
            assert tuple(targets[row][scored[row]].tolist()) == sequence.tokens[-sequence.num_scored :]
        seen += indices
    assert sorted(seen) == list(range(len(sequences)))


def test_logits_are_differentiable() -> None:
    model = tiny("llama").requires_grad_(True)
    _, logits, _, scored = next(forwards(model, choices(5), 4))
    logits[scored].square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("always")
def test_a_model_of_nan_scores_nan() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for share in (False, True):
        total, greedy = logprobs(model, choices(1), 4, share_prefixes=share)
        assert total.isnan().all()
        assert not greedy.any()


def test_no_sequences() -> None:
    total, greedy = logprobs(tiny("llama"), [], 4)
    assert len(total) == len(greedy) == 0
