"""Language tasks on a tiny Llama with a tiny tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract
from tiny_models import LIMIT, NUM_WORDS, tiny, word_tokenizer, write_base
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer

from evomerge.errors import DataError
from evomerge.evaluators.evaluator import Metric
from evomerge.evaluators.language import LanguageEvaluator, LanguageOptions
from evomerge.materialize.resident import quiet_transformers

NUM_ITEMS = 12


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of one token a word, which puts <s> in front."""
    return write_base(tmp_path_factory.mktemp("language") / "base", make_model(), word_tokenizer())


def make_model() -> Any:
    return tiny("llama", num_hidden_layers=1)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, NUM_WORDS, rng.integers(low, high)))


def greedy(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> list[int]:
    """What the model itself would answer."""
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        whole = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=num_tokens
        )
    generated: list[int] = whole[0, tokens.shape[1] :].tolist()
    return generated


def lines_of(task: str, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Items of many lengths. Of the answers some are the model's own, some miss it by their last word."""
    rng = np.random.default_rng(len(task))
    lines: list[dict[str, Any]] = []
    for number in range(NUM_ITEMS):
        line: dict[str, Any] = {"source": f"s{number // 2}"}
        if task == "text":
            line["text"] = words(rng, 1, 20)
        else:
            line["prompt"] = words(rng, 1, 15)
        if task == "answer":
            answer = greedy(model, tokenizer, line["prompt"], 1 + number % 4)
            if number % 3 == 1:
                answer[-1] = 2 + (answer[-1] + 1) % NUM_WORDS
            elif number % 3 == 2:
                answer[0] = 2 + (answer[0] + 1) % NUM_WORDS
            line["answer"] = " " + tokenizer.decode(answer)
        if task == "choice":
            line["choices"] = [" " + words(rng, 1, 5) for _ in range(2 + number % 3)]
            line["gold"] = int(rng.integers(0, len(line["choices"])))
        lines.append(line)
    return lines


def write(folder: Path, task: str, lines: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def data(base: Path) -> Path:
    folder = base.parent / "data"
    model, tokenizer = make_model(), AutoTokenizer.from_pretrained(base)
    for task in ("text", "answer", "choice"):
        write(folder, task, lines_of(task, model, tokenizer))
    return folder


def read(data: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{task}.jsonl").read_text().splitlines()]


class TestLanguage(EvaluatorContract):
    tasks = ("text", "answer", "choice")
    mean_loss_tasks = ("text", "answer")
    wanted = {"text": ["loss"], "answer": ["exact_match"], "choice": ["accuracy"]}

    @pytest.fixture
    def evaluator(self, data: Path, base: Path) -> LanguageEvaluator:
        return LanguageEvaluator(LanguageOptions(data=str(data), batch_size=8), self.wanted, base)

    @pytest.fixture
    def one_at_a_time(self, data: Path, base: Path) -> LanguageEvaluator:
        return LanguageEvaluator(LanguageOptions(data=str(data), batch_size=1), self.wanted, base)

    @pytest.fixture
    def model(self) -> Any:
        return make_model()

    @pytest.fixture
    def tokenizer(self, base: Path) -> Any:
        return AutoTokenizer.from_pretrained(base)

    def log_probabilities(self, model: Any, tokenizer: Any, text: str) -> torch.Tensor:
        """Of each token after the first, one sequence at a time and without padding."""
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logp = log_softmax(model(input_ids=tokens).logits[0, :-1].double(), -1)
        return logp.gather(-1, tokens[0, 1:, None])[:, 0]

    def test_the_loss_of_a_text(self, evaluator: LanguageEvaluator, model: Any, tokenizer: Any, data: Path) -> None:
        expected = [
            -float(self.log_probabilities(model, tokenizer, line["text"]).mean()) for line in read(data, "text")
        ]
        scores = evaluator.score(model, "text", np.arange(NUM_ITEMS))
        np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)

    def test_probabilities_of_a_bfloat16_model_are_float32(
        self, one_at_a_time: LanguageEvaluator, model: Any, tokenizer: Any, data: Path
    ) -> None:
        """Its logits are rounded, what is made of them is not; one sequence a forward, so that they are the same."""
        model.bfloat16()
        expected = [
            -float(self.log_probabilities(model, tokenizer, line["text"]).mean()) for line in read(data, "text")
        ]
        scores = one_at_a_time.score(model, "text", np.arange(NUM_ITEMS))
        np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)

    def test_exact_match_is_what_generation_finds(
        self, evaluator: LanguageEvaluator, model: Any, tokenizer: Any, data: Path
    ) -> None:
        scores = evaluator.score(model, "answer", np.arange(NUM_ITEMS))
        expected = []
        for line in read(data, "answer"):
            asked = tokenizer(line["answer"], add_special_tokens=False)["input_ids"]
            expected.append(float(greedy(model, tokenizer, line["prompt"], len(asked)) == asked))
        assert scores["exact_match"].tolist() == expected
        assert sum(expected) == NUM_ITEMS // 3

    def test_the_loss_of_an_answer_leaves_its_prompt_out(
        self, evaluator: LanguageEvaluator, model: Any, tokenizer: Any, data: Path
    ) -> None:
        expected = []
        for line in read(data, "answer"):
            num_answer = len(tokenizer(line["answer"], add_special_tokens=False)["input_ids"])
            logp = self.log_probabilities(model, tokenizer, line["prompt"] + line["answer"])
            expected.append(-float(logp[-num_answer:].mean()))
        scores = evaluator.score(model, "answer", np.arange(NUM_ITEMS))
        np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)

    def test_multiple_choice(self, evaluator: LanguageEvaluator, model: Any, tokenizer: Any, data: Path) -> None:
        """The choice whose tokens are likeliest in sum; the loss is that of the right one among the choices."""
        hits, losses, of_gold = [], [], []
        for line in read(data, "choice"):
            sums, means = [], []
            for choice in line["choices"]:
                num_tokens = len(tokenizer(choice, add_special_tokens=False)["input_ids"])
                logp = self.log_probabilities(model, tokenizer, line["prompt"] + choice)[-num_tokens:]
                sums.append(float(logp.sum()))
                means.append(-float(logp.mean()))
            hits.append(float(np.argmax(sums) == line["gold"]))
            losses.append(float(np.log(np.exp(sums).sum()) - sums[line["gold"]]))
            of_gold.append(means[line["gold"]])
        scores = evaluator.score(model, "choice", np.arange(NUM_ITEMS))
        assert scores["accuracy"].tolist() == hits
        assert 0 < sum(hits) < NUM_ITEMS
        np.testing.assert_allclose(scores["loss"], losses, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            differentiable = float(evaluator.loss(model, "choice", np.arange(NUM_ITEMS), "ce"))
        assert differentiable == pytest.approx(np.mean(of_gold), rel=1e-5)

    def test_the_entropy_is_that_of_the_predictions_of_what_is_scored(
        self, evaluator: LanguageEvaluator, model: Any, tokenizer: Any, data: Path
    ) -> None:
        expected = []
        for line in read(data, "answer"):
            num_answer = len(tokenizer(line["answer"], add_special_tokens=False)["input_ids"])
            tokens = torch.tensor([tokenizer(line["prompt"] + line["answer"])["input_ids"]])
            with torch.no_grad():
                logp = log_softmax(model(input_ids=tokens).logits[0, :-1].double(), -1)[-num_answer:]
            expected.append(-float((logp.exp() * logp).sum(-1).mean()))
        with torch.no_grad():
            ours = float(evaluator.loss(model, "answer", np.arange(NUM_ITEMS), "entropy"))
        assert ours == pytest.approx(np.mean(expected), rel=1e-5)

    def test_metrics_depend_on_the_form(self, evaluator: LanguageEvaluator) -> None:
        assert evaluator.metrics("text") == {"loss": Metric("min")}
        assert evaluator.metrics("answer") == {"exact_match": Metric("max"), "loss": Metric("min")}
        assert evaluator.metrics("choice") == {"accuracy": Metric("max"), "loss": Metric("min")}

    def test_sources_are_those_of_the_file(self, evaluator: LanguageEvaluator) -> None:
        assert list(evaluator.sources["text"]) == [f"s{i // 2}" for i in range(NUM_ITEMS)]


TEXT = {"source": 0, "text": "w1 w2 w3"}
ANSWER = {"source": 0, "prompt": "w1", "answer": " w2"}
CHOICE = {"source": 0, "prompt": "w1", "choices": [" w2", " w3"], "gold": 1}


@pytest.fixture
def make(tmp_path: Path, base: Path) -> Callable[..., LanguageEvaluator]:
    """Write lines as a task's file (a string as it is) and build the evaluator."""

    def write_and_build(*lines: Any, where: Path = base) -> LanguageEvaluator:
        write(tmp_path, "task", list(lines))
        return LanguageEvaluator(LanguageOptions(data=str(tmp_path)), {"task": ["loss"]}, where)

    return write_and_build


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["is empty"]),
        ([TEXT, "{'text': 1}\n"], ["line 2", "not JSON"]),
        ([TEXT, "\n", TEXT], ["line 2", "not JSON"]),
        ([TEXT, [1, 2]], ["line 2", "expected a JSON object", "list"]),
        ([{"text": "w1 w2"}], ["line 1", "expected source", "found text"]),
        ([{**TEXT, "answer": "w2"}], ["line 1", "expected source", "answer, source, text"]),
        ([{"source": 0, "prompt": "w1", "choices": ["w2"]}], ["line 1", "choices and gold"]),
        ([TEXT, ANSWER], ["line 2", "same keys as in line 1"]),
        ([CHOICE, {**CHOICE, "gold": 2}], ["line 2", "gold is 2 of 2 choices"]),
        ([{**CHOICE, "gold": -1}], ["line 1", "gold is -1"]),
        ([{**CHOICE, "choices": []}], ["line 1", "0 choices"]),
        ([{**CHOICE, "gold": "1"}], ["line 1", "gold"]),
        ([{**CHOICE, "gold": 0.5}], ["line 1", "gold"]),
        ([{**CHOICE, "choices": "ab"}], ["line 1", "choices"]),
        ([{**CHOICE, "choices": ["w1", 2]}], ["line 1", "choices"]),
        ([TEXT, {**TEXT, "text": 7}], ["line 2", "text"]),
        ([{**TEXT, "text": None}], ["line 1", "text"]),
        ([{**ANSWER, "prompt": ["w1"]}], ["line 1", "prompt"]),
        ([{**ANSWER, "answer": 4}], ["line 1", "answer"]),
        ([{**TEXT, "source": ["a"]}], ["line 1", "source"]),
        ([{**TEXT, "source": None}], ["line 1", "source"]),
        ([TEXT, {**TEXT, "text": ""}], ["line 2", "at least one token"]),
        ([ANSWER, {**ANSWER, "answer": " "}], ["line 2", "at least one token"]),
        ([CHOICE, {**CHOICE, "choices": [" w2", ""]}], ["line 2", "at least one token"]),
        (
            [TEXT, {**TEXT, "text": " ".join(["w1"] * LIMIT)}],
            ["task.jsonl, line 2", f"{LIMIT + 1} tokens", f"takes {LIMIT}"],
        ),
    ],
)
def test_a_malformed_file_is_named(make: Callable[..., LanguageEvaluator], lines: list[Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        make(*lines)
    for word in ["task task", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_separators_of_unicode_do_not_end_a_line(make: Callable[..., LanguageEvaluator]) -> None:
    """JSON leaves U+2028 and U+0085 in strings as they are; only a line feed ends a line."""
    text = json.dumps({"source": 0, "text": "w1 \u2028 w2 \u0085 w3"}, ensure_ascii=False)
    assert len(make(text + "\n", text + "\r\n", text).sources["task"]) == 3


def test_a_file_that_is_not_utf8(make: Callable[..., LanguageEvaluator], tmp_path: Path, base: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(b'{"source": 0, "text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"task task: .*task\.jsonl.*UTF-8"):
        LanguageEvaluator(LanguageOptions(data=str(tmp_path)), {"task": ["loss"]}, base)


def test_no_such_task(make: Callable[..., LanguageEvaluator], tmp_path: Path, base: Path) -> None:
    make(TEXT)
    with pytest.raises(DataError, match=r"task other: expected the file .*other\.jsonl.*tasks there: task"):
        LanguageEvaluator(LanguageOptions(data=str(tmp_path)), {"other": ["loss"]}, base)


def test_a_base_without_tokenizer(make: Callable[..., LanguageEvaluator], tmp_path: Path) -> None:
    with quiet_transformers():
        make_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="tokenizer") as caught:
        make(TEXT, where=tmp_path / "bare")
    assert "bare" in str(caught.value)
    assert "\n" not in str(caught.value)
