"""A user's own object: a language model's loss of short texts, and everything that an object can get wrong."""

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract
from tiny_models import tiny

from evomerge.errors import CampaignError, DataError, InputError
from evomerge.evaluators.callable import CallableEvaluator, CallableOptions
from evomerge.evaluators.evaluator import Metric
from evomerge.strict import parse

MODULE = """
import numpy as np
import torch
from torch.nn.functional import cross_entropy


class Texts:
    def __init__(self, seed, batch_size=4):
        self.rows = torch.randint(42, (13, 8), generator=torch.Generator().manual_seed(seed))
        self.batch_size = batch_size
        self.kept = {}

    def num_items(self, task):
        return {"short": 11, "long": np.int64(13)}[task]

    def score(self, model, task, items):
        rows = self.rows[items][:, : 4 if task == "short" else 8]
        losses, hits = [], []
        for batch in rows.split(self.batch_size):
            key = (task, tuple(batch.flatten().tolist()))
            tokens = self.kept.setdefault(key, batch + 0)  # made in the call: it meets gradients in a later one
            logits = model(input_ids=tokens).logits[:, :-1].float()
            losses.append(cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1))
            hits += (logits.argmax(-1) == tokens[:, 1:]).float().mean(1).tolist()
        return {"share": hits, "ignored": "what nobody asks for", "loss": torch.cat(losses)}


def make_texts(**options):
    return Texts(**options)
"""
NUMBERS = itertools.count()


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of a new name into the working directory; return its name."""
    monkeypatch.chdir(tmp_path)

    def write(source: str) -> str:
        name = f"own_evaluator_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def make(factory: str, wanted: dict[str, list[str]] | None = None, **options: Any) -> CallableEvaluator:
    return CallableEvaluator(CallableOptions(factory=factory, options=options), wanted or {"task": ["metric"]})


class TestTexts(EvaluatorContract):
    tasks = mean_loss_tasks = ("short", "long")
    wanted = {"short": ["share"], "long": ["share", "loss"]}

    @pytest.fixture
    def module(self, user: Callable[[str], str]) -> str:
        return user(MODULE)

    @pytest.fixture
    def evaluator(self, module: str) -> CallableEvaluator:
        return make(f"{module}:make_texts", self.wanted, seed=0)

    @pytest.fixture
    def one_at_a_time(self, module: str) -> CallableEvaluator:
        return make(f"{module}:Texts", self.wanted, seed=0, batch_size=1)

    @pytest.fixture
    def model(self) -> Any:
        return tiny("llama")

    def test_directions_are_the_campaigns(self, evaluator: CallableEvaluator) -> None:
        assert evaluator.metrics("short") == {"share": Metric(None)}
        assert evaluator.metrics("long") == {"share": Metric(None), "loss": Metric("min")}

    def test_sources_part_tasks_and_items(self, evaluator: CallableEvaluator) -> None:
        assert list(evaluator.sources["short"]) == [f"short/{item}" for item in range(11)]
        assert len(evaluator.sources["long"]) == 13

    def test_only_the_loss_ce(self, evaluator: CallableEvaluator, model: Any) -> None:
        with pytest.raises(DataError, match=r"task short: .*'entropy'.* ce alone"):
            evaluator.loss(model, "short", np.arange(3), "entropy")

    def test_the_digest_is_of_factory_options_counts_and_source(
        self, module: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # sources of one size that are written within a second look alike to Python's cache of bytecode
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

        def digest(source: str, factory: str = "Texts", seed: int = 0) -> str:
            Path(f"{module}.py").write_text(source)
            sys.modules.pop(module, None)
            return make(f"{module}:{factory}", self.wanted, seed=seed).digest

        changed = [
            digest(MODULE),
            digest(MODULE, factory="make_texts"),
            digest(MODULE, seed=1),
            digest(MODULE + "\n# another source"),
            digest(MODULE.replace('"short": 11', '"short": 12')),
        ]
        assert len(set(changed)) == len(changed)
        assert digest(MODULE) == changed[0]

    def test_the_path_is_as_before(self, module: str) -> None:
        before = list(sys.path)
        make(f"{module}:Texts", self.wanted, seed=0)
        with pytest.raises(CampaignError):
            make("no_such_module_anywhere:make")
        assert sys.path == before


OBJECT = """
import numpy as np
import torch


class Object:
    def num_items(self, task):
        return 10

    def score(self, model, task, items):
        weight = next(model.parameters()).flatten()[0]
        return {scored}
"""


def scored(user: Callable[[str], str], expression: str, wanted: list[str]) -> CallableEvaluator:
    """An evaluator whose object's score is a Python expression."""
    return make(f"{user(OBJECT.replace('{scored}', expression))}:Object", {"task": wanted})


@pytest.mark.parametrize(
    "expression",
    [
        "[1, 0.5, 2]",
        "(True, 0.5, np.float32(2))",
        "np.array([1, 0.5, 2])",
        "np.broadcast_to(np.array([1, 0.5, 2]), 3)",
        "torch.tensor([1, 0.5, 2], dtype=torch.bfloat16)",
        "torch.tensor([1, 0.5, 2], dtype=torch.float64).requires_grad_()",
        "[torch.tensor(1), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(2.0)]",
    ],
)
def test_numbers_of_any_kind(user: Callable[[str], str], expression: str) -> None:
    scores = scored(user, f"{{'metric': {expression}}}", ["metric"]).score(tiny("llama"), "task", np.array([5, 3, 3]))
    assert scores.keys() == {"metric"}
    assert scores["metric"].dtype == np.float32
    assert scores["metric"].tolist() == [1, 0.5, 2]


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("[1.0] * len(items)", "expected a dict of numbers by metric, found list"),
        ("None", "found NoneType"),
        ("{}", "no metric and no other; found nothing"),
        ("{'metric': [0.0] * 3, 'loss': [0.0] * 3}", "no other; found metric, loss"),
        ("{'metric': [0.0] * 2, 'other': [0.0] * 3}", "metric: expected 3 numbers, one an item, found the shape (2,)"),
        ("{'metric': [0.0] * 10, 'other': [0.0] * 3}", "found the shape (10,)"),
        ("{'metric': 0.5, 'other': [0.0] * 3}", "found the shape ()"),
        ("{'metric': torch.zeros(3, 1), 'other': [0.0] * 3}", "found the shape (3, 1)"),
        ("{'metric': ['a'] * 3, 'other': [0.0] * 3}", "metric: expected numbers, found list"),
        ("{'metric': [None] * 3, 'other': [0.0] * 3}", "metric: expected numbers, found list"),
        ("{'metric': [0.0] * 3, 'other': [0.0] * 3, 'loss': 1.0}", "loss: expected 3 numbers"),
    ],
)
def test_a_score_that_is_not_what_was_asked_for(user: Callable[[str], str], expression: str, words: str) -> None:
    evaluator = scored(user, expression, ["metric", "other"])
    with pytest.raises(DataError) as caught:
        evaluator.score(tiny("llama"), "task", np.arange(3))
    assert re.match(r"factory own_evaluator_\d+:Object: score\(\) of task task", str(caught.value))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class TestCompanions:
    @pytest.mark.parametrize(
        ("expression", "kept", "slope"),
        [
            ("{'a': items, 'b': items, 'loss': weight * torch.arange(4.0)}", {"a", "b", "loss"}, 1.5),
            ("{'a': items, 'b': items, 'loss:b': weight * torch.ones(4)}", {"a", "b", "loss:b"}, 1.0),
            (
                "{'a': items, 'b': items, 'loss': items, 'loss:a': weight * torch.ones(4), 'loss:b': weight * 4 * torch.ones(4)}",
                {"a", "b", "loss:a", "loss:b"},
                2.5,
            ),
            (
                "{'a': items, 'b': items, 'loss:c': weight * torch.ones(4), 'loss': (weight * torch.ones(4)).bfloat16()}",
                {"a", "b", "loss"},
                1.0,
            ),
        ],
    )
    def test_the_loss_is_the_mean_of_what_is_there(
        self, user: Callable[[str], str], expression: str, kept: set[str], slope: float
    ) -> None:
        model, items = tiny("llama"), np.arange(4)
        evaluator = scored(user, expression, ["a", "b"])
        assert evaluator.score(model, "task", items).keys() == kept
        assert evaluator.losses == {"ce"}
        evaluator.loss(model, "task", items, "ce").backward()
        assert float(next(model.parameters()).grad.flatten()[0]) == pytest.approx(slope)

    def test_without_one_there_is_no_loss(self, user: Callable[[str], str]) -> None:
        model = tiny("llama")
        evaluator = scored(user, "{'a': items, 'loss:b': weight * torch.ones(len(items))}", ["a"])
        assert evaluator.losses == {"ce"}  # nobody knows yet
        evaluator.score(model, "task", np.arange(2))
        assert not evaluator.losses
        with pytest.raises(DataError, match=r"follows the gradient of loss; found a, loss:b"):
            evaluator.loss(model, "task", np.arange(2), "ce")

    @pytest.mark.parametrize("expression", ["[1.0] * 3", "np.ones(3)", "(weight * torch.ones(3)).detach()"])
    def test_one_without_gradient(self, user: Callable[[str], str], expression: str) -> None:
        model = tiny("llama")
        evaluator = scored(user, f"{{'a': items, 'loss': {expression}}}", ["a"])
        assert evaluator.score(model, "task", np.arange(3)).keys() == {"a", "loss"}
        with torch.no_grad():
            assert evaluator.loss(model, "task", np.arange(3), "ce").ndim == 0  # nobody wants its gradient
        with pytest.raises(DataError, match=r"score\(\) of task task: loss has no gradient"):
            evaluator.loss(model, "task", np.arange(3), "ce")


FINE = "    def score(self, model, task, items):\n        return {}\n"


@pytest.mark.parametrize(
    ("source", "attribute", "kind", "words"),
    [
        ("import no_such_library_anywhere", "make", CampaignError, ["cannot be imported", "no_such_library_anywhere"]),
        ("def make(:", "make", CampaignError, ["cannot be imported", "SyntaxError"]),
        ("1 / 0", "make", CampaignError, ["cannot be imported", "ZeroDivisionError"]),
        ("def mak(): ...", "make", CampaignError, ["expected a function make in ", ".py"]),
        ("make = 3", "make", CampaignError, ["expected a function make in ", "found 3"]),
        ("def make(): ...", "make", CampaignError, ["called with seed, it raised TypeError", "unexpected keyword"]),
        ("def make(seed, data): ...", "make", CampaignError, ["called with seed, it raised TypeError", "data"]),
        ("def make(seed): raise OSError('no\\ndisk')", "make", CampaignError, ["it raised OSError: no disk"]),
        ("def make(seed): ...", "make", CampaignError, ["the NoneType that it made has no num_items and no score"]),
        (
            f"class A:\n    def __init__(self, seed): ...\n{FINE}",
            "A",
            CampaignError,
            ["A that it made has no num_items"],
        ),
        *(
            (
                f"class A:\n    def __init__(self, seed): ...\n    def num_items(self, task): {body}\n{FINE}",
                "A",
                DataError,
                ["num_items('task')", *words],
            )
            for body, words in [
                ("return 0", ["at least 1, found 0"]),
                ("return -3", ["found -3"]),
                ("return True", ["found True"]),
                ("return 3.0", ["found 3.0"]),
                ("return '3'", ["found '3'"]),
                ("...", ["found None"]),
                ("return {}[task]", ["raised KeyError: 'task'"]),
            ]
        ),
    ],
)
def test_an_object_that_cannot_be_used(
    user: Callable[[str], str], source: str, attribute: str, kind: type[InputError], words: list[str]
) -> None:
    module = user(source)
    with pytest.raises(kind) as caught:
        make(f"{module}:{attribute}", seed=0)
    for word in [f"factory {module}:{attribute}", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CampaignError, match="no_such_module_anywhere cannot be imported") as caught:
        make("no_such_module_anywhere:make")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "factory", ["make", "module.make", "module:", ":make", "a/b.py:make", "module:make()", "a:B.c"]
)
def test_what_names_no_factory(factory: str) -> None:
    with pytest.raises(CampaignError, match=r"evaluation\.factory: expected package\.module:make"):
        parse(CallableOptions, {"factory": factory}, "evaluation")
