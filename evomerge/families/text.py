"""Text: a Llama of 0.7M parameters and experts for Python, C++ headers, English, and sorting a string of digits.

The text comes with the dependencies (see corpus.py), so the family is the same on every machine that has the same
versions. Held-out passages come from files that were not trained on, held-out strings were never drawn.

The multiple choice asks in which order the last words of an English passage stand. At this size that carries a signal
(base .70, English expert .76, on 480 items), where telling the passage's true continuation from those of other files
does not (base .26, English expert .25, chance .25).

Shapes: R rows, T tokens of a window.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from evomerge.families.built import Built, write_items
from evomerge.families.corpus import SOURCES, Corpus, Document, read_corpus
from evomerge.families.language import (
    EOS_ID,
    SPECIAL_TOKENS,
    Item,
    Rows,
    save_checkpoint,
    score_states,
    small_llama,
    wrap_tokenizer,
)
from evomerge.families.recipes import TextRecipe
from evomerge.families.training import Meter, Progress, State, copy_state, fit, isolated, uniform_average

Tokens = NDArray[np.int64]

CORPORA = tuple(SOURCES)
SORT, CHOICE = "sort", "choice"
EXPERTS = (*CORPORA, SORT)
NUM_DIGITS = 5
SORT_LINE_TOKENS = 2 * NUM_DIGITS + 2  # digits > digits <eos>
MAX_POSITIONS = 256
TOKENIZER_CHARACTERS = 300_000  # of each corpus
CHOICE_CORPUS = "english"
NUM_CHOICES = 4
NUM_SHUFFLED_WORDS = 5


def split_strings(recipe: TextRecipe) -> tuple[list[str], list[str]]:
    """Return the strings of digits that are trained on and those that are held out."""
    shuffled = np.random.default_rng([recipe.seed, 1]).permutation(10**NUM_DIGITS)
    strings = [f"{number:0{NUM_DIGITS}d}" for number in shuffled]
    return strings[recipe.num_items :], strings[: recipe.num_items]


def build(folder: Path, recipe: TextRecipe, progress: Progress | None) -> Built:
    """Train the family, write base, experts and data under ``folder``, and return what was measured."""
    work = recipe.base.steps * recipe.base.num_rows + len(EXPERTS) * recipe.expert.steps * recipe.expert.num_rows
    meter = Meter(work, progress)
    with meter.part("corpora"):
        corpora = read_corpora(recipe)
        trained, held_out = split_strings(recipe)
        tokenizer = _train_tokenizer(corpora, recipe)
        streams = {name: _stream(tokenizer, corpus.train) for name, corpus in corpora.items()}
        streams[SORT] = _sort_lines(tokenizer, trained)
    states: dict[str, State] = {}
    with isolated(recipe.seed):
        model = small_llama(recipe, len(tokenizer), tied=True, positions=MAX_POSITIONS)
        for name in ("base", *EXPERTS):
            with meter.part(name):
                model.load_state_dict(states.get("base", model.state_dict()))
                _train(model, name, streams, recipe, meter)
                states[name] = copy_state(model)
                save_checkpoint(folder, name, model, tokenizer)
        with meter.part("held-out items"):
            states["uniform"] = uniform_average(states[name] for name in EXPERTS)
            items = _items(corpora, held_out, recipe)
            num_items = {task: write_items(folder / "data" / f"{task}.jsonl", rows) for task, rows in items.items()}
            metrics = {**dict.fromkeys(CORPORA, "loss"), SORT: "exact_match", CHOICE: "accuracy"}
            scores = score_states(model, states, tokenizer, {task: (metrics[task], items[task]) for task in items})
    return Built(
        experts=EXPERTS,
        metrics=metrics,
        objectives=(*EXPERTS, CHOICE),
        evaluation="language",
        scores=scores,
        num_items=num_items,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=meter.seconds,
        notes=(
            f"choice: the {CHOICE_CORPUS} expert scores {scores[CHOICE_CORPUS][CHOICE]:.3f}, the base "
            f"{scores['base'][CHOICE]:.3f}, chance is {1 / NUM_CHOICES:.2f} ({num_items[CHOICE]} items)",
        ),
    )


def read_corpora(recipe: TextRecipe) -> dict[str, Corpus]:
    """Return the corpora by name, each split into training documents and held-out passages."""
    return {
        name: read_corpus(name, recipe.num_train_characters, recipe.num_items, recipe.item_characters, recipe.seed)
        for name in CORPORA
    }


def _train_tokenizer(corpora: Mapping[str, Corpus], recipe: TextRecipe) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the training documents; every digit is a token of its own."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["\n".join(d.text for d in corpus.train)[:TOKENIZER_CHARACTERS] for corpus in corpora.values()]
    backend.train_from_iterator(texts, trainer)
    return wrap_tokenizer(backend)


def _stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Tokens:
    """Return the documents as one stream of tokens, an end-of-sequence token after each."""
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    return np.concatenate([[*ids, EOS_ID] for ids in encoded]).astype(np.int64)


def _sort_lines(tokenizer: PreTrainedTokenizerFast, strings: Sequence[str]) -> Tokens:
    """Return one line a string: its digits, the separator, the digits in order, the end; shape (strings, tokens)."""
    digit_ids = np.array(tokenizer.convert_tokens_to_ids(list("0123456789")))
    digits = np.array([list(string) for string in strings]).astype(np.int64)
    separator = np.full((len(strings), 1), tokenizer.convert_tokens_to_ids(">"))
    end = np.full((len(strings), 1), EOS_ID)
    return np.concatenate([digit_ids[digits], separator, digit_ids[np.sort(digits, axis=1)], end], axis=1)


def _train(model: nn.Module, name: str, streams: Mapping[str, Tokens], recipe: TextRecipe, meter: Meter) -> None:
    """Train the base on the mixture of streams, an expert on its own."""
    is_base = name == "base"
    schedule = recipe.base if is_base else recipe.expert
    shares = recipe.mixture if is_base else [float(name == expert) for expert in EXPERTS]
    rng = np.random.default_rng([recipe.seed, 2, 0 if is_base else 1 + EXPERTS.index(name)])

    def loss() -> Tensor:
        num_rows = rng.multinomial(schedule.num_rows, shares)
        drawn = [
            _draw(expert, streams[expert], num, recipe.window, rng)
            for expert, num in zip(EXPERTS, num_rows.tolist(), strict=True)
        ]
        return Rows(torch.cat([rows.ids for rows in drawn]), torch.cat([rows.counts for rows in drawn])).loss(model)

    fit(model.parameters(), loss, schedule, lambda: meter.advance(name, schedule.num_rows))


def _draw(expert: str, stream: Tokens, num_rows: int, window: int, rng: np.random.Generator) -> Rows:
    """Return windows of the stream; of lines to sort, which are packed, only answers and ends count."""
    if expert != SORT:
        starts = rng.integers(0, len(stream) - window, (num_rows, 1))
        ids = torch.tensor(stream[starts + np.arange(window)])
        return Rows(ids, torch.ones_like(ids, dtype=torch.bool))
    num_lines = -(-window // SORT_LINE_TOKENS)
    lines = stream[rng.integers(0, len(stream), (num_rows, num_lines))]
    ids = torch.tensor(lines.reshape(num_rows, num_lines * SORT_LINE_TOKENS)[:, :window])
    counts = torch.arange(window) % SORT_LINE_TOKENS > NUM_DIGITS
    return Rows(ids, counts.repeat(num_rows, 1))


def _items(corpora: Mapping[str, Corpus], strings: Sequence[str], recipe: TextRecipe) -> dict[str, list[Item]]:
    """Return the held-out items of every task."""
    items: dict[str, list[Item]] = {
        name: [{"source": passage.source, "text": passage.text} for passage in corpus.held_out]
        for name, corpus in corpora.items()
    }
    items[SORT] = [{"source": text, "prompt": f"{text}>", "answer": "".join(sorted(text))} for text in strings]
    items[CHOICE] = _choice_items(corpora[CHOICE_CORPUS].held_out, recipe)
    return items


def _choice_items(passages: Sequence[Document], recipe: TextRecipe) -> list[Item]:
    """Return half passages with the question in which order their last words stand; the wrong orders are fixed here."""
    rng = np.random.default_rng([recipe.seed, 8])
    items: list[Item] = []
    for passage in passages:
        words = passage.text.split()
        for half in (words[: len(words) // 2], words[len(words) // 2 :]):
            prompt, right = half[:-NUM_SHUFFLED_WORDS], tuple(half[-NUM_SHUFFLED_WORDS:])
            wrong = sorted(set(permutations(right)) - {right})
            if not prompt or len(wrong) < NUM_CHOICES - 1:
                continue
            orders = [wrong[index] for index in rng.choice(len(wrong), NUM_CHOICES - 1, replace=False)]
            gold = int(rng.integers(NUM_CHOICES))
            orders.insert(gold, right)
            # the space opens the choice, because there the tokenizer cuts too
            choices = [" " + " ".join(order) for order in orders]
            items.append({"source": passage.source, "prompt": " ".join(prompt), "choices": choices, "gold": gold})
    return items
