"""Greedy generation on real tiny models: against the model's own next token, one at a time."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import NUM_WORDS, tiny, word_tokenizer

from evomerge.errors import DataError
from evomerge.evaluators.generate import Limits, answer_text, end_tokens, generate

TOKENIZER = word_tokenizer()
PROMPTS = [tuple(int(t) for t in np.random.default_rng(n).integers(2, NUM_WORDS, 1 + n % 5)) for n in range(7)]
KINDS = ("llama", "gpt2", "gemma3_text", "mistral", "mamba")


def argmax_by_argmax(model: Any, prompt: Sequence[int], limit: int, ends: frozenset[int] = frozenset()) -> list[int]:
    tokens = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            likeliest = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if likeliest in ends:
            break
        tokens.append(likeliest)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_the_likeliest_token_each_time(kind: str) -> None:
    model = tiny(kind, **({"state_size": 4} if kind == "mamba" else {}))
    expected = [tuple(argmax_by_argmax(model, prompt, 8)) for prompt in PROMPTS]
    assert len(set(expected)) > 3, "answers that are all the same would prove nothing"
    for batch_size in (1, 3, 7):
        assert generate(model, TOKENIZER, PROMPTS, Limits(8), batch_size) == expected


def test_it_ends_at_an_end_token_and_leaves_it_out() -> None:
    model = tiny("llama")
    free = [argmax_by_argmax(model, prompt, 12) for prompt in PROMPTS]
    ends = frozenset({free[0][3], free[1][5]})
    expected = [tuple(argmax_by_argmax(model, prompt, 12, ends)) for prompt in PROMPTS]
    assert {len(row) for row in expected} != {12}
    assert generate(model, TOKENIZER, PROMPTS, Limits(12, ends), 3) == expected


def test_an_answer_may_be_empty() -> None:
    model = tiny("llama")
    first = argmax_by_argmax(model, PROMPTS[0], 1)[0]
    assert generate(model, TOKENIZER, PROMPTS[:1], Limits(5, frozenset({first})), 2) == [()]
    assert generate(model, TOKENIZER, [], Limits(5), 2) == []


def test_a_stop_string_of_several_tokens_ends_each_answer_by_itself() -> None:
    model = tiny("llama")
    free = [argmax_by_argmax(model, prompt, 12) for prompt in PROMPTS]
    stop = TOKENIZER.decode(free[2][4:6])
    written = generate(model, TOKENIZER, PROMPTS, Limits(12, stop=(stop,)), 4)
    assert len(written[2]) == 6
    for tokens, whole in zip(written, free, strict=True):
        text = TOKENIZER.decode(whole)
        assert tokens == tuple(whole[: len(tokens)])
        assert (len(tokens) == 12) == (stop not in text or text.endswith(stop))
        assert (
            answer_text(TOKENIZER, tokens, [stop]) == TOKENIZER.decode(whole, skip_special_tokens=True).split(stop)[0]
        )


def test_a_text_is_cut_at_its_first_stop_string() -> None:
    tokens = TOKENIZER("w1 w2 w3 w4", add_special_tokens=False)["input_ids"]
    assert answer_text(TOKENIZER, tuple(tokens), ["w4", " w2"]) == "w1"
    assert answer_text(TOKENIZER, tuple(tokens), ["w9"]) == "w1 w2 w3 w4"
    assert answer_text(TOKENIZER, (), ["w9"]) == ""


def test_settings_of_the_checkpoint_stay_out() -> None:
    """Sampling, penalties and forced tokens would make another answer, or another one each time."""
    model = tiny("llama")
    expected = generate(model, TOKENIZER, PROMPTS, Limits(8), 4)
    held = model.generation_config
    held.update(
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3,
        max_length=4, min_new_tokens=20, forced_eos_token_id=4, bad_words_ids=[[7]], eos_token_id=9, max_new_tokens=2,
    )  # fmt: skip
    before = held.to_dict()
    assert generate(model, TOKENIZER, PROMPTS, Limits(8), 4) == expected
    assert model.generation_config is held
    assert held.to_dict() == before


def test_end_tokens_are_the_models_and_the_tokenizers() -> None:
    model = tiny("llama")
    assert end_tokens(model, TOKENIZER) == frozenset()
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model, word_tokenizer(eos_token="w9")) == {5, 6, 11}
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, TOKENIZER) == {7}


def test_a_model_of_nan_still_writes() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    written = generate(model, TOKENIZER, PROMPTS, Limits(5), 3)
    assert [len(tokens) for tokens in written] == [5] * len(PROMPTS)


def test_it_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, TOKENIZER, PROMPTS, Limits(5, frozenset({3}), ("w1",)), 3)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_model_that_cannot_write() -> None:
    with pytest.raises(DataError, match="LlamaModel cannot generate"):
        generate(tiny("llama").model, TOKENIZER, PROMPTS, Limits(5), 3)
