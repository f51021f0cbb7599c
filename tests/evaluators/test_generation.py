"""What a tiny Llama writes, judged by functions, by a model behind a real server, and written by a real server."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract, assert_same_scores
from pydantic import ValidationError
from served_model import ServedModel, serving
from tiny_models import LIMIT, NUM_WORDS, tiny, word_tokenizer, write_base
from torch.nn.functional import log_softmax

from evomerge.errors import CampaignError, DataError
from evomerge.evaluators.evaluator import Metric
from evomerge.evaluators.generate import Limits, generate
from evomerge.evaluators.generation import GenerationEvaluator, GenerationOptions
from evomerge.evaluators.judge import JudgeError, ModelJudge, ModelJudgeOptions

NUM_ITEMS, NEW = 12, 6
EVERYTHING = np.arange(NUM_ITEMS)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w0{% endif %}"
)
JUDGES = """
calls = []
def refusals(lines, answers):
    calls.append((lines, answers))
    return {"refusal": [float("w2" in answer) for answer in answers], "words": [len(a.split()) for a in answers]}
def raises(lines, answers): raise RuntimeError("no such\\nrubric")
def short(lines, answers): return {"refusal": [1.0] * (len(answers) - 1)}
def words(lines, answers): return {"refusal": ["no"] * len(answers)}
def number(lines, answers): return 0.5
def nothing(lines, answers): return {"refusal": [float("nan")] * len(answers)}
def spoils(lines, answers):
    for line in lines: line.clear()
    return {"refusal": [0.0] * len(answers)}
constant = 3
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = word_tokenizer(eos_token="w9", chat_template=TEMPLATE)
    return write_base(tmp_path_factory.mktemp("generation") / "base", tiny("llama"), tokenizer)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer(eos_token="w9")


@pytest.fixture
def model() -> Any:
    return tiny("llama")


def write(folder: Path, task: str, lines: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def data(base: Path, tokenizer: Any) -> Path:
    """Prompts of many lengths; some answers are the model's own, some miss it by their last word, some are prefixes."""
    rng, model = np.random.default_rng(0), tiny("llama")
    answered = []
    for number in range(NUM_ITEMS):
        prompt = " ".join(f"w{n}" for n in rng.integers(10, NUM_WORDS, rng.integers(1, 15)))
        tokens = tuple(tokenizer(prompt)["input_ids"])
        own = list(generate(model, tokenizer, [tokens], Limits(NEW, frozenset({11})), 1)[0]) or [5]
        answer = {0: own, 1: [*own[:-1], 2 + (own[-1] + 1) % NUM_WORDS], 2: own[:1]}[number % 3]
        answered.append({"source": f"s{number // 2}", "prompt": prompt, "answer": " " + tokenizer.decode(answer)})
    folder = base.parent / "data"
    write(folder, "answered", answered)
    write(folder, "again", list(reversed(answered)))
    return write(folder, "open", [{key: line[key] for key in ("source", "prompt")} for line in answered])


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of judges in the working directory."""
    (tmp_path / "my_judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    yield lambda: sys.modules["my_judges"]
    sys.modules.pop("my_judges", None)


@pytest.fixture
def make(data: Path, base: Path) -> Callable[..., GenerationEvaluator]:
    def build(wanted: dict[str, list[str]], **changes: Any) -> GenerationEvaluator:
        given = {"data": str(data), "batch_size": 5, "max_new_tokens": NEW} | changes
        return GenerationEvaluator(GenerationOptions.model_validate(given), wanted, base)

    return build


class TestGeneration(EvaluatorContract):
    tasks = mean_loss_tasks = ("answered", "again")
    wanted = {"answered": ["exact_match"], "again": ["length"]}

    @pytest.fixture
    def evaluator(self, make: Callable[..., GenerationEvaluator]) -> GenerationEvaluator:
        return make(self.wanted, batch_size=5)

    @pytest.fixture
    def one_at_a_time(self, make: Callable[..., GenerationEvaluator]) -> GenerationEvaluator:
        return make(self.wanted, batch_size=1)

    @pytest.fixture
    def model(self) -> Any:
        return tiny("llama")

    def test_scores_are_those_of_the_models_own_answers(
        self, evaluator: GenerationEvaluator, model: Any, tokenizer: Any, data: Path
    ) -> None:
        scores = evaluator.score(model, "answered", EVERYTHING)
        matches, lengths, losses = [], [], []
        for line in map(json.loads, (data / "answered.jsonl").read_text().splitlines()):
            tokens = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
            with torch.no_grad():
                whole = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    max_new_tokens=NEW,
                    eos_token_id=11,
                )
                asked = torch.tensor([tokenizer(line["prompt"] + line["answer"])["input_ids"]])
                logp = log_softmax(model(input_ids=asked).logits[0, :-1].double(), -1)
            written = [token for token in whole[0, tokens.shape[1] :].tolist() if token != 11]
            matches.append(float(tokenizer.decode(written, skip_special_tokens=True) == line["answer"].strip()))
            lengths.append(len(written))
            of_tokens = logp.gather(-1, asked[0, 1:, None])[tokens.shape[1] - 1 :, 0]
            losses.append(-float(of_tokens.mean()))
        assert scores["exact_match"].tolist() == matches
        assert NUM_ITEMS // 3 <= sum(matches) < NUM_ITEMS
        assert scores["length"].tolist() == lengths
        np.testing.assert_allclose(scores["loss"], losses, rtol=1e-5)

    def test_metrics_and_their_directions(self, evaluator: GenerationEvaluator) -> None:
        expected = {"length": Metric("min", follows_loss=False), "exact_match": Metric("max"), "loss": Metric("min")}
        assert evaluator.metrics("answered") == expected


def test_lines_without_answers_have_a_length_and_no_loss(make: Callable[..., GenerationEvaluator], model: Any) -> None:
    evaluator = make({"open": ["length"]})
    assert evaluator.metrics("open") == {"length": Metric("min", follows_loss=False)}
    assert evaluator.losses == frozenset()
    assert make({"open": ["length"], "answered": ["length"]}).losses == frozenset()
    scores = evaluator.score(model, "open", EVERYTHING)
    assert_same_scores(scores, {"length": make({"answered": []}).score(model, "answered", EVERYTHING)["length"]})
    with pytest.raises(DataError, match="task open.*'ce'.*no answer"):
        evaluator.loss(model, "open", EVERYTHING, "ce")


def test_a_model_that_never_ends_is_cut(make: Callable[..., GenerationEvaluator], model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[11] = 0
    for limit in (1, 9):
        evaluator = make({"open": ["length"]}, max_new_tokens=limit)
        assert evaluator.score(model, "open", EVERYTHING)["length"].max() == limit


def test_stop_strings_end_an_answer(make: Callable[..., GenerationEvaluator], model: Any, judges: Any) -> None:
    wanted = {"open": ["words"]}
    free = make(wanted, judge="my_judges:refusals").score(model, "open", EVERYTHING)
    answers = judges().calls[-1][1]
    stop = max((answer.split()[1] for answer in answers if len(answer.split()) > 2), key=len)
    stopped = make(wanted, judge="my_judges:refusals", stop=[stop]).score(model, "open", EVERYTHING)
    assert judges().calls[-1][1] == [answer.split(stop)[0] for answer in answers]
    assert stopped["length"].sum() < free["length"].sum()


def test_a_model_of_nan_scores_nan_and_does_not_raise(make: Callable[..., GenerationEvaluator], model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    scores = make({"answered": ["length"]}).score(model, "answered", EVERYTHING)
    assert np.isnan(scores["loss"]).all()
    assert not scores["exact_match"].any()


def test_chat(make: Callable[..., GenerationEvaluator], model: Any, tokenizer: Any, data: Path, judges: Any) -> None:
    evaluator = make({"answered": ["refusal"]}, chat=True, judge="my_judges:refusals")
    scores = evaluator.score(model, "answered", EVERYTHING)
    for number, line in enumerate(map(json.loads, (data / "answered.jsonl").read_text().splitlines())):
        prompt = tokenizer(f"user {line['prompt']} w0", add_special_tokens=False)["input_ids"]
        answer = tokenizer(line["answer"], add_special_tokens=False)["input_ids"]
        whole = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logp = log_softmax(model(input_ids=whole).logits[0, :-1].double(), -1)
        loss = -float(logp.gather(-1, whole[0, 1:, None])[-len(answer) :].mean())
        assert scores["loss"][number] == pytest.approx(loss, rel=1e-5)
        written = generate(model, tokenizer, [tuple(prompt)], Limits(NEW, frozenset({11})), 1)[0]
        assert judges().calls[-1][1][number] == tokenizer.decode(written, skip_special_tokens=True)


def test_chat_needs_a_template(data: Path, tmp_path: Path) -> None:
    bare = write_base(tmp_path / "bare", tiny("llama"), word_tokenizer())
    with pytest.raises(DataError, match=r"bare.*chat template"):
        GenerationEvaluator(
            GenerationOptions(data=str(data), chat=True, max_new_tokens=NEW), {"open": ["length"]}, bare
        )


class TestFunctionJudges:
    def test_it_sees_lines_and_answers_and_is_asked_for_what_objectives_want(
        self, make: Callable[..., GenerationEvaluator], model: Any, judges: Any, data: Path
    ) -> None:
        evaluator = make({"answered": ["refusal", "length"], "open": ["length"]}, judge="my_judges:refusals")
        assert evaluator.metrics("answered")["refusal"] == Metric(None, follows_loss=False)
        assert "words" not in evaluator.metrics("answered")
        items = np.array([4, 1, 1])
        scores = evaluator.score(model, "answered", items)
        assert scores.keys() == evaluator.metrics("answered").keys()
        lines, answers = judges().calls[-1]
        in_file = [json.loads(line) for line in (data / "answered.jsonl").read_text().splitlines()]
        assert lines == [in_file[item] for item in items]
        assert scores["refusal"].dtype == np.float32
        assert scores["refusal"].tolist() == ["w2" in answer for answer in answers]
        evaluator.score(model, "open", items)
        assert len(judges().calls) == 1, "no objective wants its metrics of this task"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("short", ["refusal", "expected 3 numbers", "(2,)"]),
            ("words", ["refusal", "expected numbers"]),
            ("number", ["expected a dict", "float"]),
        ],
    )
    def test_what_it_must_not_report(
        self, make: Callable[..., GenerationEvaluator], model: Any, judges: Any, name: str, words: list[str]
    ) -> None:
        evaluator = make({"open": ["refusal"]}, judge=f"my_judges:{name}")
        with pytest.raises(DataError) as caught:
            evaluator.score(model, "open", np.arange(3))
        for word in [f"judge my_judges:{name}", *words]:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_metric_that_it_does_not_report(
        self, make: Callable[..., GenerationEvaluator], model: Any, judges: Any
    ) -> None:
        evaluator = make({"open": ["toxicity"]}, judge="my_judges:refusals")
        with pytest.raises(DataError, match="judge my_judges:refusals.*'toxicity'.*found refusal, words"):
            evaluator.score(model, "open", np.arange(3))

    def test_one_that_raises(self, make: Callable[..., GenerationEvaluator], model: Any, judges: Any) -> None:
        with pytest.raises(JudgeError, match="my_judges:raises raised RuntimeError: no such rubric"):
            make({"open": ["refusal"]}, judge="my_judges:raises").score(model, "open", np.arange(3))

    def test_one_that_has_no_opinion_scores_nan(
        self, make: Callable[..., GenerationEvaluator], model: Any, judges: Any
    ) -> None:
        scores = make({"open": ["refusal"]}, judge="my_judges:nothing").score(model, "open", np.arange(3))
        assert np.isnan(scores["refusal"]).all()

    def test_one_that_changes_its_lines_changes_nothing_here(
        self, make: Callable[..., GenerationEvaluator], model: Any, judges: Any
    ) -> None:
        evaluator = make({"answered": ["refusal"]}, judge="my_judges:spoils")
        first = evaluator.score(model, "answered", EVERYTHING)
        assert_same_scores(first, evaluator.score(model, "answered", EVERYTHING))

    @pytest.mark.parametrize(
        ("named", "words"),
        [
            ("my_judges", ["expected package.module:function"]),
            ("no_such_module:judge", ["no_such_module cannot be imported", "ModuleNotFoundError"]),
            ("my_judges:refuse", ["expected a function refuse", "my_judges.py", "None"]),
            ("my_judges:constant", ["expected a function constant", "found 3"]),
        ],
    )
    def test_one_that_cannot_be_called(
        self, make: Callable[..., GenerationEvaluator], judges: Any, named: str, words: list[str]
    ) -> None:
        before = list(sys.path)
        with pytest.raises(CampaignError) as caught:
            make({"open": ["refusal"]}, judge=named)
        for word in ["judge", named, *words]:
            assert word in str(caught.value)
        assert sys.path == before

    def test_lines_may_hold_more_for_a_judge_and_only_for_one(
        self, make: Callable[..., GenerationEvaluator], tmp_path: Path, judges: Any, model: Any
    ) -> None:
        folder = write(tmp_path / "rubrics", "open", [{"source": 0, "prompt": "w1", "rubric": "polite"}])
        evaluator = make({"open": ["refusal"]}, judge="my_judges:refusals", data=str(folder))
        evaluator.score(model, "open", np.array([0]))
        assert judges().calls[-1][0][0]["rubric"] == "polite"
        with pytest.raises(
            DataError, match=r"open\.jsonl, line 1: expected source, prompt.*found prompt, rubric, source"
        ):
            make({"open": ["length"]}, data=str(folder))

    def test_the_code_of_a_judge_is_in_the_digest(self, make: Callable[..., GenerationEvaluator], judges: Any) -> None:
        def digest() -> str:
            return make({"open": ["refusal"]}, judge="my_judges:refusals").digest

        first = digest()
        assert digest() == first
        Path("my_judges.py").write_text(JUDGES + "\n# stricter\n")
        assert digest() != first


class TestModelJudges:
    judge = {
        "model": "j",
        "metric": "harm",
        "prompt": "Q {prompt} R {reference} A {answer} {other}",
        "retries": 0,
        "parallel": 3,
    }

    def test_the_first_number_of_its_reply_counts(
        self, make: Callable[..., GenerationEvaluator], model: Any, data: Path
    ) -> None:
        replies = {}

        def reply(_path: str, body: dict[str, Any], _headers: Any) -> tuple[int, Any]:
            question = body["messages"][0]["content"]
            text = ["I rate it -2.5 of 10", "7/10", "no number", ".5"][len(question) % 4]
            replies[question] = {"I": -2.5, "7": 7.0, "n": np.nan, ".": 5.0}[text[0]]
            return 200, {"choices": [{"message": {"content": text}}]}

        with serving(reply) as url:
            evaluator = make({"answered": ["harm"]}, judge={**self.judge, "url": url})
            assert evaluator.metrics("answered")["harm"] == Metric(None, follows_loss=False)
            scores = evaluator.score(model, "answered", EVERYTHING)
        lines = [json.loads(line) for line in (data / "answered.jsonl").read_text().splitlines()]
        questions = {
            next(q for q in replies if q.startswith(f"Q {line['prompt']} R {line['answer']} A ")): n
            for n, line in enumerate(lines)
        }
        assert all(question.endswith("{other}") for question in questions)
        np.testing.assert_array_equal(scores["harm"], [replies[question] for question in questions])
        assert np.isnan(scores["harm"]).any()

    def test_an_answer_that_looks_like_a_template_is_left_alone(self) -> None:
        asked = []

        def reply(_path: str, body: dict[str, Any], _headers: Any) -> tuple[int, Any]:
            asked.append(body["messages"][0]["content"])
            return 200, {"choices": [{"message": {"content": "1"}}]}

        with serving(reply) as url:
            judge = ModelJudge(ModelJudgeOptions(**{**self.judge, "url": url, "prompt": "{answer}|{prompt}"}))
            judge.judge([{"prompt": "secret"}], ["{prompt} {reference}"], ["harm"])
        assert asked == ["{prompt} {reference}|secret"]

    def test_it_knows_one_metric(self, make: Callable[..., GenerationEvaluator]) -> None:
        evaluator = make({"answered": ["harm", "other"]}, judge={**self.judge, "url": "http://h"})
        assert evaluator.metrics("answered").keys() == {"length", "exact_match", "loss", "harm"}

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"prompt": "Is it good?"}, "{answer}"),
            ({"metric": "length"}, "of the judge's own"),
            ({"url": "judge:80"}, "http"),
        ],
    )
    def test_options_that_make_no_judge(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ValidationError, match=words):
            GenerationOptions.model_validate({"data": "d", "judge": {**self.judge, "url": "http://h", **changes}})

    def test_a_reference_that_is_not_there(self, make: Callable[..., GenerationEvaluator]) -> None:
        with pytest.raises(DataError, match=r"open\.jsonl, line 1: expected an answer.*{reference}"):
            make({"open": ["harm"]}, judge={**self.judge, "url": "http://h"})


class TestEndpoint:
    @pytest.mark.parametrize("chat", [False, True])
    def test_a_server_that_is_given_the_candidate_answers_as_the_resident_model(
        self, make: Callable[..., GenerationEvaluator], model: Any, tmp_path: Path, chat: bool, judges: Any
    ) -> None:
        wanted, served = {"answered": ["words"], "open": ["length"]}, ServedModel()
        changes = {"chat": chat, "stop": ["w33"], "judge": "my_judges:refusals"}
        resident = make(wanted, **changes)
        with serving(served) as url:
            publish = {"folder": str(tmp_path / "candidate"), "url": f"{url}/update_weights_from_disk"}
            remote = make(wanted, **changes, endpoint={"url": f"{url}/v1", "model": "m", "publish": publish})
            for seed in (0, 1):
                torch.manual_seed(seed)
                with torch.no_grad():
                    model.lm_head.weight.copy_(0.5 * torch.randn_like(model.lm_head.weight))
                ours, theirs = (e.score(model, "answered", EVERYTHING) for e in (resident, remote))
                assert judges().calls[-1] == judges().calls[-2]
                assert_same_scores(
                    {k: v for k, v in ours.items() if k != "length"}, {k: v for k, v in theirs.items() if k != "length"}
                )
            remote.score(model, "open", EVERYTHING)
        assert len(served.loads) == 3
        assert len(served.asked) == 3 * NUM_ITEMS

    def test_a_server_that_is_given_no_candidate_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="publish"):
            GenerationOptions.model_validate({"data": "d", "endpoint": {"url": "http://h/v1", "model": "m"}})


OPEN = {"source": 0, "prompt": "w1"}
ANSWERED = {"source": 0, "prompt": "w1", "answer": " w2"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([OPEN, ANSWERED], ["line 2", "same keys as in line 1"]),
        ([{"source": 0, "answer": "w1"}], ["line 1", "expected source, prompt", "found answer, source"]),
        ([{**OPEN, "anwser": "w1"}], ["line 1", "found anwser, prompt, source"]),
        ([{**OPEN, "prompt": ["w1"]}], ["line 1", "prompt to be a string"]),
        ([{**ANSWERED, "answer": 3}], ["line 1", "answer to be a string"]),
        ([ANSWERED, {**ANSWERED, "answer": ""}], ["line 2", "at least one token"]),
        ([OPEN, {**OPEN, "prompt": " ".join(["w1"] * (LIMIT - NEW))}], ["line 2", f"{LIMIT - NEW + 1} tokens", f"takes {LIMIT}"]),
        ([{**ANSWERED, "answer": " w2" * LIMIT}], ["line 1", f"and {LIMIT} for the answer", "cut it"]),
        ([[OPEN]], ["line 1", "JSON object"]),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named(
    make: Callable[..., GenerationEvaluator], tmp_path: Path, lines: list[Any], words: list[str]
) -> None:
    folder = write(tmp_path / "bad", "task", lines)
    with pytest.raises(DataError) as caught:
        make({"task": ["length"]}, data=str(folder))
    for word in ["task task", "task.jsonl", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_makes_the_scores_is_in_the_digest(make: Callable[..., GenerationEvaluator], tmp_path: Path) -> None:
    wanted = {"open": ["length"]}
    digests = [
        make(wanted, **changes).digest
        for changes in ({}, {"max_new_tokens": 3}, {"stop": ["w1"]}, {"chat": True}, {"batch_size": 1})
    ]
    assert len(set(digests)) == 4
    assert digests[0] == digests[4]
    assert make(wanted, data=str(write(tmp_path / "other", "open", [OPEN]))).digest not in digests
