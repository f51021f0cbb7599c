"""Scores are lm-eval's own, item by item, and its prompts are made once."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract
from tiny_harness import LIMIT, NUM_DOCS, TASKS, docs, make_model, save, write_lines, write_task, write_tasks

from evomerge.errors import DataError
from evomerge.evaluators.lm_eval import LmEvalEvaluator
from evomerge.evaluators.lm_eval_tasks import LmEvalOptions

Make = Callable[..., LmEvalEvaluator]
ALL = np.arange(NUM_DOCS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def make(base: Path, folder: Path) -> Make:
    """Make an evaluator of tasks of the folder; a task may be given with the metrics that are wanted."""

    def make(*tasks: str, metrics: Mapping[str, list[str]] = {}, **options: Any) -> LmEvalEvaluator:
        options = {"include_path": str(folder), "batch_size": 5, **options}
        return LmEvalEvaluator(LmEvalOptions(**options), {task: metrics.get(task, []) for task in tasks}, base)

    return make


@pytest.fixture(scope="module")
def whole(make: Make) -> LmEvalEvaluator:
    return make(*TASKS)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder for tasks of a test's own, with documents."""
    write_lines(tmp_path / "train.jsonl", docs(4, seed=1))
    write_lines(tmp_path / "test.jsonl", docs(4, seed=2))
    return tmp_path


@pytest.fixture
def model() -> Any:
    return make_model()


CONTRACTED = ("choice", "last", "rolling", "write")


@pytest.fixture(scope="module")
def contracted(make: Make) -> LmEvalEvaluator:
    return make(*CONTRACTED)


@pytest.fixture(scope="module")
def contracted_one_at_a_time(make: Make) -> LmEvalEvaluator:
    return make(*CONTRACTED, batch_size=1)


class TestLmEval(EvaluatorContract):
    tasks = CONTRACTED
    mean_loss_tasks = tasks

    @pytest.fixture
    def evaluator(self, contracted: LmEvalEvaluator) -> LmEvalEvaluator:
        return contracted

    @pytest.fixture
    def one_at_a_time(self, contracted_one_at_a_time: LmEvalEvaluator) -> LmEvalEvaluator:
        return contracted_one_at_a_time

    @pytest.fixture
    def model(self) -> Any:
        return make_model()


# Beside lm-eval itself


def assert_as_lm_eval(evaluator: LmEvalEvaluator, results: Any, samples: Any, tasks: list[str]) -> None:
    """All items together, and a part of them in another order: what lm-eval reports, of each document and in sum.

    Numbers that are counted are equal; log-likelihoods are sums of float32 in another order.
    """
    model, part = make_model(), np.array([9, 2, 11, 5])
    for task in tasks:
        full = evaluator.score(model, task, ALL)
        for items, scores in ((ALL, full), (part, evaluator.score(model, task, part))):
            for metric in evaluator.metrics(task).keys() - {"loss"}:
                key, name = metric.split(",") if "," in metric else (metric, "none")
                logged = {sample["doc_id"]: sample[key] for sample in samples[task] if sample["filter"] == name}
                assert logged.keys() == set(range(NUM_DOCS))
                for item, value in zip(items.tolist(), scores[metric], strict=True):
                    if "perplexity" in key or "bits" in key:
                        np.testing.assert_allclose(value, logged[item], rtol=0, atol=2e-4)
                    else:
                        np.testing.assert_array_equal(value, logged[item])
        for metric, how in evaluator.metrics(task).items():
            if metric != "loss":
                value = how.aggregate(full[metric], ALL) if how.aggregate else float(full[metric].astype(float).mean())
                expected = results[task][metric if "," in metric else f"{metric},none"]
                assert value == pytest.approx(expected, rel=1e-5 if how.aggregate else 1e-12), (task, metric)


def in_process(base: Path, folder: Path, tasks: list[str], **options: Any) -> tuple[Any, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(str(base), device="cpu", dtype="float32", batch_size=4)
    found = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    return found["results"], found["samples"]


def test_every_metric_of_every_output_type_is_lm_evals(base: Path, folder: Path, whole: LmEvalEvaluator) -> None:
    tasks = list(TASKS)
    assert_as_lm_eval(whole, *in_process(base, folder, tasks), tasks)
    written = whole.score(make_model(), "said", ALL)
    assert len(np.unique(written["code"])) > 5, "texts that are all the same would prove nothing"
    assert 0 < whole.score(make_model(), "choice", ALL)["acc"].mean() < 1
    assert any(len(request.sequences) > 1 for request in whole._tasks["rolling"].items[0].requests)
    longest = max(len(part.tokens) for item in whole._tasks["choice"].items for part in item.reference)
    assert longest == LIMIT + 1, "prompts that all fit would not show that they are cut alike"


@pytest.mark.parametrize("multiturn", [True, False])
def test_prompts_of_a_chat_are_lm_evals(base: Path, folder: Path, make: Make, multiturn: bool) -> None:
    tasks = ["choice", "said"]
    options = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "sleep"}
    assert_as_lm_eval(
        make(*tasks, num_fewshot=1, **options), *in_process(base, folder, tasks, num_fewshot=1, **options), tasks
    )


@pytest.mark.slow
def test_the_command_line_says_the_same(base: Path, folder: Path, whole: LmEvalEvaluator, tmp_path: Path) -> None:
    tasks = [task for task in TASKS if task != "letter"]  # of its mcc the command line bootstraps an error, for minutes
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={base},dtype=float32", "--tasks", ",".join(tasks)]
    command += ["--include_path", str(folder), "--log_samples", "--output_path", str(tmp_path)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ran = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    samples = {
        task: list(map(json.loads, next(tmp_path.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()))
        for task in tasks
    }
    assert_as_lm_eval(whole, results, samples, tasks)


# Prompts are made once


def test_fifty_candidates_see_the_same_tokens(make: Make, model: Any) -> None:
    evaluator, items, tasks = make("choice", "last"), np.array([3, 8]), ("choice", "last")
    before = [evaluator._tasks[task].digest for task in tasks]
    fed: list[bytes] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"].numpy().tobytes()), with_kwargs=True
    )
    seen, losses = set(), set()
    for _ in range(50):
        fed.clear()
        losses |= {float(evaluator.score(model, task, items)["loss"][0]) for task in tasks}
        seen.add(hashlib.sha256(b"".join(fed)).hexdigest())
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    assert len(losses) == 100, "candidates that are all the same would prove nothing"
    assert len(seen) == 1
    assert [evaluator._tasks[task].digest for task in tasks] == before


def test_the_digest_is_of_what_is_asked(make: Make, other: Path) -> None:
    first = make("choice").digest
    assert make("choice").digest == make("choice", batch_size=2, prefix_cache=False).digest == first
    assert make("choice", num_fewshot={"choice": 1}).digest != first
    digests = set()
    for metric, text in (("acc", "{{text}}"), ("acc", "so {{text}}"), ("acc_norm", "{{text}}")):
        section = {
            **TASKS["choice"],
            "doc_to_text": text,
            "metric_list": [{"metric": metric, "aggregation": "mean"}],
        }
        write_task(other, "mine", **section)
        digests.add(make("mine", include_path=str(other)).digest)
    write_lines(other / "test.jsonl", docs(4, seed=5))
    digests.add(make("mine", include_path=str(other)).digest)
    assert len(digests) == 4


def test_global_generators_are_left_alone(make: Make) -> None:
    import random

    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = (random.random(), float(torch.rand(())), float(np.random.random()))
    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)
    make("choice")
    assert (random.random(), float(torch.rand(())), float(np.random.random())) == expected


def test_choices_of_one_token_take_one_row(make: Make, model: Any) -> None:
    rows = []
    model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    make("letter", batch_size=100).score(model, "letter", ALL)
    assert sum(rows) == NUM_DOCS


# What is reported


def test_metrics_are_named_as_lm_eval_prints_them(whole: LmEvalEvaluator, make: Make) -> None:
    assert whole.metrics("choice").keys() == {"acc", "acc_norm", "acc_mutual_info", "loss"}
    assert whole.metrics("write").keys() == {"exact_match,whole", "exact_match,word", "loss"}
    assert whole.metrics("last")["perplexity"].direction == whole.metrics("last")["loss"].direction == "min"
    assert whole.metrics("said")["length"].direction == "max"
    assert whole.metrics("choice")["acc"].aggregate is None
    assert whole.metrics("letter")["mcc"].aggregate is not None
    assert make("choice", metrics={"choice": ["acc,none"]}).metrics("choice").keys() >= {"acc", "acc,none"}


def test_a_direction_that_lm_eval_does_not_say(make: Make, other: Path) -> None:
    """And a metric that no metric_list announces, as process_results returns it."""
    (other / "results.py").write_text("def both(doc, results):\n    return {'size': 1, 'loss': 2.0}\n")
    write_task(
        other,
        "mine",
        **{**TASKS["said"], "metric_list": [{"metric": "size", "aggregation": "mean", "higher_is_better": None}]},
    )
    with (other / "mine.yaml").open("a") as file:
        file.write("process_results: !function results.both\n")
    evaluator = make("mine", include_path=str(other))
    assert {name: metric.direction for name, metric in evaluator.metrics("mine").items()} == {
        "size": None,
        "loss": None,
    }
    scores = evaluator.score(make_model(), "mine", np.arange(4))
    assert scores.keys() == {"size", "loss", "loss:size", "loss:loss"}, "its own loss is not taken for the companion"
    assert scores["loss"].tolist() == [2.0] * 4
    assert len(np.unique(scores["loss:size"])) > 1


def test_the_companion_is_the_right_answers_log_probability(whole: LmEvalEvaluator, model: Any) -> None:
    """Against a slow twin: item by item, straight from the model, of lm-eval's own requests."""

    def logprob(part: Any) -> float:
        row = torch.tensor([part.tokens])
        with torch.no_grad():
            logp = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        return float(logp.gather(-1, row[0, 1:, None])[-part.num_scored :].sum())

    for task in ("choice", "last", "rolling", "write"):
        losses = whole.score(model, task, ALL)["loss"]
        for item in (0, 7):
            held = whole._tasks[task].items[item]
            totals = torch.tensor([logprob(part) for part in held.reference])
            if task == "choice":
                expected = -totals.log_softmax(0)[held.doc["gold"]]
                assert len(totals) == 4
            else:
                expected = -totals.sum() / sum(part.num_scored for part in held.reference)
            assert losses[item] == pytest.approx(float(expected), rel=1e-4)
    written = whole._tasks["write"].items[3]
    answer = whole._harness.tokenizer.decode(written.reference[0].tokens[-written.reference[0].num_scored :])
    assert answer == f" {written.doc['last']}"


def test_several_right_choices_are_right_together(make: Make, other: Path, model: Any) -> None:
    for name in ("train", "test"):
        write_lines(other / f"{name}.jsonl", [{**doc, "gold": [0, 2]} for doc in docs(4, seed=2)])
    write_task(
        other,
        "both",
        **{
            **TASKS["choice"],
            "num_fewshot": 0,
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **TASKS["letter"]["metric_list"][0]}],
        },
    )
    write_task(other, "first", **{**TASKS["choice"], "num_fewshot": 0, "doc_to_target": 0})
    write_task(other, "third", **{**TASKS["choice"], "num_fewshot": 0, "doc_to_target": 2})
    evaluator = make("both", "first", "third", include_path=str(other))
    losses = {task: evaluator.score(model, task, np.arange(4))["loss"] for task in ("both", "first", "third")}
    np.testing.assert_allclose(np.exp(-losses["both"]), np.exp(-losses["first"]) + np.exp(-losses["third"]), rtol=1e-4)


def test_without_a_known_answer_there_is_no_companion(make: Make, other: Path, model: Any) -> None:
    write_task(other, "mine", **{**TASKS["write"], "num_fewshot": 0, "doc_to_target": ""})
    evaluator = make("mine", include_path=str(other))
    assert evaluator.losses == frozenset()
    assert "loss" not in evaluator.metrics("mine")
    assert "loss" not in evaluator.score(model, "mine", np.arange(4))
    with pytest.raises(DataError, match="task mine: .*no right answer"):
        evaluator.loss(model, "mine", np.arange(4), "ce")


def test_equal_documents_have_one_source(make: Make, other: Path) -> None:
    twins = [*docs(3, seed=2), *docs(1, seed=2)]
    write_lines(other / "test.jsonl", twins)
    for task in ("choice", "last"):
        write_task(other, task, **TASKS[task])
    sources = make("choice", "last", include_path=str(other)).sources
    assert sources["choice"] == sources["last"]
    assert sources["choice"][0] == sources["choice"][3]
    assert len(set(sources["choice"])) == 3
    named = make("choice", include_path=str(other), sources={"choice": "last"}).sources["choice"]
    assert named == [doc["last"] for doc in twins]
    assert make("choice", include_path=str(other), sources={"choice": "gold"}).sources["choice"] == [
        d["gold"] for d in twins
    ]


# What models and tasks do


def test_a_model_of_nan_scores_nan(whole: LmEvalEvaluator, model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for task in TASKS:
        for metric, scores in whole.score(model, task, ALL).items():
            how = whole.metrics(task)[metric]
            assert np.isnan(how.aggregate(scores, ALL)) if how.aggregate else np.isnan(scores).all()


def test_an_answer_without_end_is_cut(make: Make, other: Path, model: Any) -> None:
    section = {**TASKS["said"], "generation_kwargs": {"until": ["never said"], "max_gen_toks": 11}}
    write_task(other, "mine", **{**section, "metric_list": TASKS["write"]["metric_list"]})
    fed = []
    model.register_forward_pre_hook(lambda _, __, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    evaluator = make("mine", include_path=str(other), batch_size=100)
    assert (evaluator.score(model, "mine", np.arange(4))["exact_match"] == 0).all()
    assert fed.count(1) == 10  # one token a forward, after the prompt's
    fed.clear()
    make("mine", include_path=str(other), batch_size=100, max_gen_toks=3).score(model, "mine", np.arange(4))
    assert fed.count(1) == 2
    fed.clear()
    make("mine", include_path=str(other), batch_size=100, gen_kwargs={"max_gen_toks": 5}).score(
        model, "mine", np.arange(4)
    )
    assert fed.count(1) == 4


def test_what_process_results_raises_is_the_candidates_fate(make: Make, other: Path, model: Any) -> None:
    (other / "results.py").write_text(
        "def picky(doc, results):\n    if len(results[0]) != 3:\n        raise ValueError('expected three letters')\n    return {'acc': 1}\n"
    )
    write_task(other, "mine", **TASKS["said"])
    with (other / "mine.yaml").open("a") as file:
        file.write("process_results: !function results.picky\n")
    evaluator = make("mine", include_path=str(other))
    assert evaluator.metrics("mine").keys() == {"length", "code", "loss"}, "what the file declares"
    with pytest.raises(ValueError, match="expected three letters"):
        evaluator.score(model, "mine", np.arange(4))


# Mistakes


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"test_split": None}, {}, "task mine: lm-eval cannot prepare it .*must have valid or test docs"),
    ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, {}, "task mine: lm-eval cannot prepare it .*nowhere.jsonl"),
    (
        {"metric_list": [{"metric": "no_such", "aggregation": "mean", "higher_is_better": True}]},
        {},
        "task mine: lm-eval has no metric 'no_such'",
    ),
    ({"doc_to_text": "{{txet}}"}, {}, "task mine: lm-eval cannot prepare it .*'txet' is undefined"),
    ({"unsafe_code": True}, {}, "task mine: it runs code that the model writes"),
    (
        {"generation_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}},
        {},
        r"task mine: .*sampling.*gen_kwargs: \{do_sample",
    ),
    ({"generation_kwargs": {"num_beams": 3, "max_gen_toks": 4}}, {}, "task mine: .*num_beams; only greedy"),
    (
        {"generation_kwargs": {"max_gen_toks": LIMIT}},
        {},
        f"task mine: it writes up to {LIMIT} tokens, but the model takes {LIMIT}, prompts included; lower them with eval",
    ),
    ({}, {"num_fewshot": 50}, "task mine: lm-eval cannot prepare it .*[Ss]ample"),
    (
        {},
        {"sources": {"mine": "txet"}},
        "task mine: evaluation.sources: document 0 has no field 'txet'; did you mean 'text'",
    ),
    ({}, {"sources": {"mien": "text"}}, "evaluation.sources: no objective is of a task 'mien'; did you mean 'mine'"),
    ({}, {"num_fewshot": {"mien": 1}}, "evaluation.num_fewshot: no objective is of a task 'mien'; did you mean 'mine'"),
    ({}, {"include_path": "no/such/folder"}, "evaluation.include_path: expected a folder of task files, found none"),
]


@pytest.mark.parametrize(("section", "options", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_mistakes_are_named(make: Make, other: Path, section: Any, options: Any, message: str) -> None:
    write_task(other, "mine", **{**TASKS["write"], **section})
    with pytest.raises(DataError, match=message) as caught:
        make("mine", **{"include_path": str(other), **options})
    assert "\n" not in str(caught.value)


def test_sampling_can_be_made_greedy(make: Make, other: Path) -> None:
    write_task(other, "mine", **{**TASKS["write"], "generation_kwargs": {"do_sample": True, "temperature": 1.0}})
    make("mine", include_path=str(other), max_gen_toks=4, gen_kwargs={"do_sample": False, "temperature": 0})


def test_a_task_without_documents(make: Make, other: Path) -> None:
    write_task(other, "mine", **{**TASKS["choice"], "process_docs": None})
    (other / "none.py").write_text("def none(dataset):\n    return dataset.select([])\n")
    with (other / "mine.yaml").open("a") as file:
        file.write("process_docs: !function none.none\n")
    with pytest.raises(DataError, match="task mine: lm-eval cannot prepare it") as caught:
        make("mine", include_path=str(other))
    assert "\n" not in str(caught.value)


def test_a_target_without_a_token(make: Make, other: Path) -> None:
    write_task(other, "mine", **{**TASKS["last"], "doc_to_text": "{{text}}", "doc_to_target": ""})
    with pytest.raises(DataError, match=f"task mine: expected 1 to {LIMIT} tokens to score.*found 0"):
        make("mine", include_path=str(other))


def test_a_group_names_its_tasks(make: Make, other: Path) -> None:
    for name in ("one", "two"):
        write_task(other, name, **TASKS["letter"], tag="some")
    (other / "all.yaml").write_text("group: all\ntask: [two, {task: one}]\n")
    for name, kind in (("all", "group"), ("some", "tag")):
        with pytest.raises(DataError, match=f"task {name}: it is a {kind} of 2 tasks; .*: one, two"):
            make(name, include_path=str(other))


def test_a_file_that_cannot_be_read_is_named(make: Make, other: Path) -> None:
    """lm-eval leaves it out without a word, and looks elsewhere."""
    (other / "mine.yaml").write_text("task: mine\n  output_type: [\n")
    with pytest.raises(DataError, match="task mine: mine.yaml cannot be read") as caught:
        make("mine", include_path=str(other))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_name_that_nobody_knows(make: Make) -> None:
    """Indexing lm-eval's own tasks takes a quarter of a minute."""
    with pytest.raises(DataError, match=r"task hellaswagg: neither lm-eval's registry .*did you mean 'hellaswag"):
        make("hellaswagg")
    with pytest.raises(DataError, match="task hellaswag: lm-eval cannot prepare it .*Hub"):
        make("hellaswag")


def test_a_base_that_is_no_causal_model(make: Make, folder: Path, base: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(DataError, match="expected .*causal language model.* found .*'t5'"):
        LmEvalEvaluator(LmEvalOptions(include_path=str(folder)), {"choice": []}, tmp_path)


@pytest.fixture(autouse=True)
def silence(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    capfd.readouterr()
