"""Text and orders: held-out items, the bound of the orders, and scores that agree with generation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_families import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import EvoMergeError
from evomerge.families.corpus import read_corpus
from evomerge.families.family import FAMILIES, FamilySummary
from evomerge.families.language import choice_accuracy, exact_match, mean_loss
from evomerge.families.orders import ORDERS, answers, split_prompts
from evomerge.families.text import CORPORA, read_corpora, split_strings


def read_items(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(place: Path):
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(place)


@pytest.mark.parametrize("recipe", [SMALL["orders"], FAMILIES["orders"].recipe])
def test_no_held_out_prompt_is_trained_on_and_no_two_answers_coincide(recipe) -> None:
    train, held_out = (({tuple(row) for row in rows.tolist()}) for rows in split_prompts(recipe))
    assert not train & held_out
    assert len(held_out) == recipe.num_held_out
    for row in held_out:
        given = {tuple(sorted(row)), tuple(sorted(row, reverse=True)), row[::-1]}
        assert len(given) == len(ORDERS)


def test_orders_share_their_prompts_and_exclude_each_other(families: dict[str, FamilySummary]) -> None:
    summary = families["orders"]
    tasks = [read_items(summary.path / "data" / f"{order}.jsonl") for order in ORDERS]
    for ascending, descending, reverse in zip(*tasks, strict=True):
        assert ascending["source"] == descending["source"] == reverse["source"]
        assert ascending["prompt"] == descending["prompt"] == reverse["prompt"]
        assert len({ascending["answer"], descending["answer"], reverse["answer"]}) == 3
    assert all(sum(scores.values()) <= 1 for scores in summary.scores.values())


def test_answers_by_example() -> None:
    assert answers(np.array([[3, 1, 2]]))[:, 0].tolist() == [[1, 2, 3], [3, 2, 1], [2, 1, 3]]


def test_exact_match_agrees_with_generation(families: dict[str, FamilySummary]) -> None:
    model, tokenizer = load(families["orders"].path / "experts" / "reversed")
    prompts = ["123>", "907>", "550>"]
    generated = model.generate(**tokenizer(prompts, return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    texts = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in generated[:, 4:]]
    digits_only = [(p, t) for p, t in zip(prompts, texts, strict=True) if len(t) == 3]
    right = [{"prompt": p, "answer": t} for p, t in digits_only]
    wrong = [{"prompt": p, "answer": t[:2] + ("1" if t[2] != "1" else "2")} for p, t in digits_only]
    assert exact_match(model, tokenizer, right) == 1.0
    assert exact_match(model, tokenizer, wrong) == 0.0


def test_loss_and_choice_agree_with_one_row_at_a_time(families: dict[str, FamilySummary]) -> None:
    summary = families["text"]
    model, tokenizer = load(summary.path / "experts" / "python")
    losses = []
    items = read_items(summary.path / "data" / "python.jsonl")
    for item in items:
        ids = tokenizer(item["text"], return_tensors="pt")["input_ids"]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert mean_loss(model, tokenizer, items) == pytest.approx(np.mean(losses), rel=1e-4)
    assert summary.scores["python"]["python"] == pytest.approx(np.mean(losses), rel=1e-3)

    choices = read_items(summary.path / "data" / "choice.jsonl")
    hits = [_likeliest(model, tokenizer, item) == item["gold"] for item in choices]
    assert choice_accuracy(model, tokenizer, choices) == pytest.approx(np.mean(hits))


def _likeliest(model, tokenizer, item) -> int:
    scores = []
    for choice in item["choices"]:
        prompt = tokenizer(item["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(choice)["input_ids"]])
        log_probabilities = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        scores.append(log_probabilities.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return int(np.argmax(scores))


def test_held_out_text_comes_from_files_that_do_not_train() -> None:
    for corpus in read_corpora(SMALL["text"]).values():
        trained = {document.source for document in corpus.train}
        assert trained.isdisjoint(passage.source for passage in corpus.held_out)
        assert len(corpus.held_out) == SMALL["text"].num_items
        everything = "\n".join(document.text for document in corpus.train)
        assert not any(passage.text in everything for passage in corpus.held_out)


def test_held_out_strings_do_not_train() -> None:
    train, held_out = split_strings(FAMILIES["text"].recipe)
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == len({*train, *held_out}) == 100_000


def test_items_on_disk_are_the_held_out_ones(families: dict[str, FamilySummary]) -> None:
    data, recipe = families["text"].path / "data", SMALL["text"]
    corpora = read_corpora(recipe)
    for name in CORPORA:
        assert [item["text"] for item in read_items(data / f"{name}.jsonl")] == [p.text for p in corpora[name].held_out]
    assert [item["source"] for item in read_items(data / "sort.jsonl")] == split_strings(recipe)[1]
    for item in read_items(data / "choice.jsonl"):
        right = item["prompt"] + item["choices"][item["gold"]]
        assert any(right in " ".join(p.text.split()) for p in corpora["english"].held_out)
        assert len(set(item["choices"])) == 4


def test_too_little_text_is_said() -> None:
    with pytest.raises(EvoMergeError, match="corpus 'c': expected 1000000000 characters"):
        read_corpus("c", 10**9, 1, 100, seed=0)
