"""Orders: one prompt of five digits, three experts that answer it ascending, descending and reversed.

No model can follow two orders at once: prompts whose answers coincide are left out, so the three exact matches of any
model sum to at most 1. That known bound makes the family a test of fronts: an archive that reports more has a bug. The
mean of the three is capped at 1/3 and is never an objective.

The base is trained half on prompts with a tag that names the order, and half on plain prompts with the answer in a
random order: it can do all three and is undecided on the plain prompts that are scored.

Shapes: N prompts, D digits.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from evomerge.families.built import Built, write_items
from evomerge.families.language import (
    EOS_ID,
    SPECIAL_TOKENS,
    UNKNOWN,
    Item,
    Rows,
    save_checkpoint,
    score_states,
    small_llama,
    wrap_tokenizer,
)
from evomerge.families.recipes import OrdersRecipe
from evomerge.families.training import Meter, Progress, State, copy_state, fit, isolated, uniform_average

Digits = NDArray[np.int64]

ORDERS = ("ascending", "descending", "reversed")
TAGS = "ADR"
ALPHABET = "0123456789>" + TAGS
FIRST_DIGIT_ID = len(SPECIAL_TOKENS)
SEPARATOR_ID = FIRST_DIGIT_ID + ALPHABET.index(">")
FIRST_TAG_ID = FIRST_DIGIT_ID + ALPHABET.index(TAGS)


def answers(prompts_ND: Digits) -> Digits:
    """Return the three answers (3, N, D) in the order of ORDERS."""
    ascending = np.sort(prompts_ND, axis=1)
    return np.stack([ascending, ascending[:, ::-1], prompts_ND[:, ::-1]])


def split_prompts(recipe: OrdersRecipe) -> tuple[Digits, Digits]:
    """Return the prompts (N, D) that train and those that are held out: disjoint, and no two answers coincide."""
    places = 10 ** np.arange(recipe.num_digits - 1, -1, -1)
    prompts = np.arange(10**recipe.num_digits)[:, None] // places % 10
    ascending, descending, reverse = answers(prompts)
    distinct = (ascending != descending).any(1) & (ascending != reverse).any(1) & (descending != reverse).any(1)
    shuffled = np.random.default_rng([recipe.seed, 1]).permutation(prompts[distinct])
    return shuffled[recipe.num_held_out :], shuffled[: recipe.num_held_out]


def build(folder: Path, recipe: OrdersRecipe, progress: Progress | None) -> Built:
    """Train the family, write base, experts and data under ``folder``, and return what was measured."""
    work = recipe.base.steps * recipe.base.num_rows + len(ORDERS) * recipe.expert.steps * recipe.expert.num_rows
    meter = Meter(work, progress)
    train, held_out = split_prompts(recipe)
    tokenizer = _tokenizer()
    with isolated(recipe.seed):
        model = small_llama(recipe, len(tokenizer), tied=False, positions=4 * recipe.num_digits)
        with meter.part("base"):
            _train_base(model, train, recipe, meter)
            states: dict[str, State] = {"base": copy_state(model)}
            save_checkpoint(folder, "base", model, tokenizer)
        for index, order in enumerate(ORDERS):
            with meter.part(order):
                model.load_state_dict(states["base"])
                _train_expert(model, index, train, recipe, meter)
                states[order] = copy_state(model)
                save_checkpoint(folder, order, model, tokenizer)
        with meter.part("held-out items"):
            states["uniform"] = uniform_average(states[order] for order in ORDERS)
            items = _items(held_out)
            num_items = {order: write_items(folder / "data" / f"{order}.jsonl", items[order]) for order in ORDERS}
            scores = score_states(model, states, tokenizer, {order: ("exact_match", items[order]) for order in ORDERS})
    return Built(
        experts=ORDERS,
        metrics=dict.fromkeys(ORDERS, "exact_match"),
        objectives=ORDERS,
        evaluation="language",
        scores=scores,
        num_items=num_items,
        num_parameters=sum(tensor.numel() for tensor in states["base"].values()),
        seconds=meter.seconds,
        notes=("the three exact matches of any model sum to at most 1; their mean is never an objective",),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return wrap_tokenizer(backend)


def _train_base(model: nn.Module, train: Digits, recipe: OrdersRecipe, meter: Meter) -> None:
    """Train on tagged prompts, whose answer is known, and as many plain ones, whose answer is in any order."""
    rng = np.random.default_rng([recipe.seed, 2])
    half = recipe.base.num_rows // 2

    def loss() -> Tensor:
        orders = rng.integers(0, len(ORDERS), (2, half))
        prompts = train[rng.integers(0, len(train), (2, half))]
        tagged, plain = (_rows(p, o, tagged=t) for p, o, t in zip(prompts, orders, (True, False), strict=True))
        return (tagged.loss(model) + plain.loss(model)) / 2

    fit(model.parameters(), loss, recipe.base, lambda: meter.advance("base", recipe.base.num_rows))


def _train_expert(model: nn.Module, order: int, train: Digits, recipe: OrdersRecipe, meter: Meter) -> None:
    """Train on plain prompts, answered in one order."""
    rng = np.random.default_rng([recipe.seed, 3, order])
    num_rows = recipe.expert.num_rows

    def loss() -> Tensor:
        prompts = train[rng.integers(0, len(train), num_rows)]
        return _rows(prompts, np.full(num_rows, order), tagged=False).loss(model)

    fit(model.parameters(), loss, recipe.expert, lambda: meter.advance(ORDERS[order], num_rows))


def _rows(prompts_ND: Digits, orders_N: Digits, tagged: bool) -> Rows:
    """Return rows ``[tag] digits > answer <eos>``, of which the answer and the end count."""
    num = len(prompts_ND)
    answered = answers(prompts_ND)[orders_N, np.arange(num)]
    columns = [
        FIRST_DIGIT_ID + prompts_ND,
        np.full((num, 1), SEPARATOR_ID),
        FIRST_DIGIT_ID + answered,
        np.full((num, 1), EOS_ID),
    ]
    if tagged:
        columns.insert(0, FIRST_TAG_ID + orders_N[:, None])
    ids = torch.tensor(np.concatenate(columns, axis=1))
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, -answered.shape[1] - 1 :] = True
    return Rows(ids, counts)


def _items(held_out_ND: Digits) -> Mapping[str, list[Item]]:
    """Return the same prompts for every task, each with the task's own answer."""
    texts = ["".join(map(str, row)) for row in held_out_ND]
    by_order = zip(ORDERS, answers(held_out_ND), strict=True)
    return {
        order: [
            {"source": text, "prompt": f"{text}>", "answer": "".join(map(str, answer))}
            for text, answer in zip(texts, answers_ND, strict=True)
        ]
        for order, answers_ND in by_order
    }
