"""Looking at a run: tables for people and scripts, comparisons, picking within bounds, frames, figures, live models."""

import csv
import io
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from silent_watcher import Interrupt, Interrupting, Silent
from typer.testing import CliRunner

import evomerge
from evomerge.campaign.campaign import Campaign
from evomerge.cli import app
from evomerge.errors import CampaignError, InputError, RunError
from evomerge.evaluators.classification import ClassificationEvaluator, ClassificationOptions
from evomerge.families.family import FamilySummary
from evomerge.front.front import maximized
from evomerge.ledger.location import locate
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import tensors_hash
from evomerge.materialize.resident import load_processor
from evomerge.run.comparison import compare_runs
from evomerge.run.rescore import rescore
from evomerge.run.run import Run
from evomerge.run.search import search
from evomerge.run.status import current_status

ROOT = Path(__file__).parents[2]
OBJECTIVES = [
    {"name": "parity", "task": "parity", "metric": "accuracy"},
    {"name": "turned", "task": "rot90", "metric": "loss"},
]


@pytest.fixture(scope="module")
def run(small_digits: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two objectives, one of them minimized; the third task of the family is left for later."""
    folder = tmp_path_factory.mktemp("inspect")
    sections = yaml.safe_load(small_digits.campaign.read_text())
    sections |= {
        "base": str(small_digits.path / "base"),
        "experts": {name: str(small_digits.path / "experts" / name) for name in ("rot90", "parity")},
        "objectives": OBJECTIVES,
        "search": [{"proposer": "sobol"}],
        "budget": {"evaluations": 12},
    }
    sections["evaluation"]["data"] = str(small_digits.path / "data")
    (folder / "campaign.yaml").write_text(yaml.safe_dump(sections))
    return search(evomerge.read_campaign(folder / "campaign.yaml"), folder / "runs" / "digits", watcher=Silent())


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def as_json(*words: object) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(invoke(*words, "--json"), parse_constant=pytest.fail)
    return data


def as_rows(*words: object) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(invoke(*words, "--csv"))))


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (("front", "RUN"), "models"),
        (("status", "RUN"), "runs"),
        (("show", "RUN", "knee"), "scores"),
        (("compare", "RUN", "0", "uniform"), "objectives"),
        (("compare", "RUN", "RUN"), "runs"),
        (("runs", "RUN"), "runs"),
        (("operators",), "operators"),
    ],
    ids=lambda words: words[0],
)
def test_people_and_scripts_see_the_same(run: Run, words: tuple[str, ...], table: str) -> None:
    words = tuple(str(run.location) if word == "RUN" else word for word in words)
    lines = invoke(*words).replace(str(run.location), "runs/digits").splitlines()
    assert all(len(line) <= 100 for line in lines), max(lines, key=len)
    rows, of_json = as_rows(*words), as_json(*words)[table]
    assert [row.keys() for row in rows] == [row.keys() for row in of_json]
    with pytest.raises(InputError, match="expected one of them"):
        invoke(*words, "--json", "--csv")


def test_front_rows_hold_whole_numbers_in_the_users_sign(run: Run) -> None:
    shown = as_json("front", run.location)
    members = {row["trial"]: row for row in shown["models"] if row["on_front"]}
    assert members.keys() == {trial.number for trial in run.front}
    assert shown["knee"] == run.front.knee().number
    assert shown["hypervolume"] == run.hypervolume()
    for number, row in members.items():
        assert row["search/turned"] == run.searched[f"trial:{number}"].scores["turned"].value
        assert row["test_stderr/parity"] == run.tested[f"trial:{number}"].scores["parity"].stderr
    (base,) = (row for row in as_rows("front", run.location) if row["model"] == "base")
    assert float(base["test/turned"]) == run.tested["base"].scores["turned"].value


def test_the_hypervolume_stands_with_its_error_as_when_runs_are_compared(run: Run) -> None:
    expected = compare_runs(run, run).hypervolume.sides[0]
    low, high = expected.interval
    cells = {"": expected.value, "_stderr": expected.stderr, "_low": low, "_high": high}
    (status,) = as_json("status", run.location)["runs"]
    for shown in (as_json("front", run.location), status):
        assert {end: shown[f"hypervolume{end}"] for end in cells} == cells
    assert expected.value == run.hypervolume()
    assert 0 <= low < high
    for command in ("front", "status"):
        text = " ".join(invoke(command, run.location).split())
        said = f"hypervolume {expected.value:.4g} ±{expected.stderr:.2g} (95 % {low:.3g} to {high:.3g}) above the base"
        assert said in text


def test_the_plot_shows_the_front_beside_what_was_there(run: Run) -> None:
    text = invoke("front", run.location)
    picture = text[: text.index("models on the front")]
    frame, legend = picture.split("└")
    for sign, name in (("●", "front"), ("◆", "knee"), ("B", "base"), ("U", "uniform"), ("·", "others, by search")):
        assert f"{sign} {name}" in legend
    assert {"◆", "B", "·"} <= set(frame)
    assert "turned ↓" in picture
    assert re.search(r"^ +\d\.\d+ ┤", picture, flags=re.MULTILINE)


def test_one_objective_is_plotted_over_its_results(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    campaign = make_campaign(objectives=OBJECTIVES[1:], search=[{"proposer": "sobol"}], budget={"evaluations": 4})
    search(campaign, tmp_path / "run", watcher=Silent())
    text = invoke("front", tmp_path / "run")
    assert "● best so far" in text
    assert evomerge.figures.front(evomerge.open(tmp_path / "run")).data[1].y[-1] == min(
        row["search/turned"] for row in as_json("front", tmp_path / "run")["models"] if row["trial"] is not None
    )


def test_show_says_where_a_trial_came_from_and_what_it_gains(run: Run) -> None:
    knee = run.front.knee()
    shown = as_json("show", run.location, "knee")
    assert (shown["trial"], shown["state"], shown["is_knee"]) == (knee.number, "scored", True)
    assert {row["place"] for row in shown["numbers"]} == {
        f"coefficient/{held['expert']}/{held['group']}" for held, _ in run.numbers_of(knee)
    }
    beside = {(row["other"], row["objective"]): row for row in shown["differences"]}
    row = beside["expert:rot90", "turned"]
    ours, theirs = (run.tested[name].scores["turned"].items for name in (f"trial:{knee.number}", "expert:rot90"))
    assert row["difference"] == pytest.approx(float(np.mean(ours - theirs.astype(np.float64))), abs=1e-6)
    assert (row["items_gained"], row["items_lost"]) == ((ours < theirs).sum(), (ours > theirs).sum())
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["verdict"] == (
        "better" if row["difference_high"] < 0 else "worse" if row["difference_low"] > 0 else "alike"
    )
    for word, message in (("99", "no trial 99"), ("best", "expected the number of a trial, or knee")):
        with pytest.raises(RunError, match=message):
            invoke("show", run.location, word)


def test_show_tells_why_a_trial_failed(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    campaign = make_campaign(
        operator={"name": "task_arithmetic"},
        space={"coefficient": {"low": 1e30, "high": 1e38}},
        search=[{"proposer": "sobol"}],
        budget={"evaluations": 2},
    )
    run = search(campaign, tmp_path / "run", watcher=Silent())
    failed = next(trial for trial in run.trials if trial.failure)
    assert f"failed: {failed.failure}" in invoke("show", tmp_path / "run", failed.number)
    (status,) = as_json("status", tmp_path / "run")["runs"]
    assert status["failures"] == {trial.failure: 2 for trial in run.trials}
    assert status["best_by_objective"] == {}


def test_models_are_compared_on_what_both_are_scored_on(run: Run) -> None:
    inside, outside = run.front[0], next(t for t in run.trials if t not in run.front)
    assert as_json("compare", run.location, inside.number, "base")["split"] == "test"
    shown = as_json("compare", run.location, inside.number, outside.number)
    assert shown["split"] == "search"
    assert [row["objective"] for row in shown["objectives"]] == ["parity", "turned"]
    mirrored = as_json("compare", run.location, outside.number, inside.number)["objectives"]
    assert [row["difference"] for row in mirrored] == [-row["difference"] for row in shown["objectives"]]
    with pytest.raises(RunError, match="uniforn: expected the number of a trial.*did you mean 'uniform'"):
        invoke("compare", run.location, "knee", "uniforn")
    with pytest.raises(RunError, match="expected a second model of that run"):
        invoke("compare", run.location, "3")


def test_runs_are_compared_at_equal_cost(run: Run, tmp_path: Path) -> None:
    shorter = run.campaign.model_copy(update={"budget": run.campaign.budget.model_copy(update={"evaluations": 5})})
    other = search(shorter, tmp_path / "short", watcher=Silent())
    compared = compare_runs(run, other)
    whole, short = compared.sides
    assert compared.has_same_items
    assert compared.equal_cost == pytest.approx(5.0)
    at_equal_cost, at_end = compared.at_equal_cost, compared.hypervolume
    assert at_equal_cost.sides[0] == at_equal_cost.sides[1] == at_end.sides[1], "the same proposals"
    assert (at_equal_cost.difference.value, at_equal_cost.difference.stderr) == (0.0, 0.0)
    assert at_end.sides[0].value - at_end.sides[1].value == at_end.difference.value >= 0
    assert at_end.sides[0].value == pytest.approx(run.hypervolume())
    assert whole.coverage == 1.0, "the same proposals and more"
    assert compared.on_test is not None
    shown = as_json("compare", run.location, other.location)
    assert [row["coverage"] for row in shown["runs"]] == [1.0, short.coverage]
    for row, side in zip(shown["runs"], compared.on_test.sides, strict=True):
        assert (row["hypervolume_on_test"], row["hypervolume_on_test_stderr"]) == (side.value, side.stderr)
        assert 0 <= row["hypervolume_on_test_low"] <= row["hypervolume_on_test_high"]
    by_name = {row["of"]: row for row in shown["differences"]}
    assert by_name.keys() == {"hypervolume_at_equal_cost", "hypervolume", "hypervolume_on_test"}
    assert by_name["hypervolume"]["difference"] == at_end.difference.value
    assert "differences are paired over items" in invoke("compare", run.location, other.location)
    alone = compare_runs(run, run)
    assert alone.sides[0].coverage == alone.sides[1].coverage == 1.0
    for volumes in (alone.hypervolume, alone.at_equal_cost, alone.on_test):
        assert volumes is not None
        assert (volumes.difference.value, volumes.difference.stderr) == (0.0, 0.0)


def test_runs_on_other_splits_are_independent(run: Run, tmp_path: Path) -> None:
    other = search(run.campaign.model_copy(update={"seed": 1}), tmp_path / "other", watcher=Silent())
    compared = compare_runs(run, other)
    assert not compared.has_same_items
    for volumes in (compared.hypervolume, compared.on_test):
        assert volumes is not None
        errors = [side.stderr for side in volumes.sides]
        assert volumes.difference.stderr == pytest.approx(np.hypot(*errors), rel=0.2)
    shown = " ".join(invoke("compare", run.location, other.location).split())
    assert "differences are of independent runs" in shown


def test_a_front_of_none_has_no_hypervolume(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    wanting = [{**objective, "floor": 1e9} for objective in OBJECTIVES[:1]]
    campaign = make_campaign(objectives=wanting, search=[{"proposer": "sobol"}], budget={"evaluations": 2})
    run = search(campaign, tmp_path / "run", watcher=Silent())
    compared = compare_runs(run, run)
    assert compared.on_test is None
    assert (compared.hypervolume.sides[0].value, compared.hypervolume.sides[0].interval) == (0.0, (0.0, 0.0))
    assert "test" not in {
        row["of"].rpartition("_")[2] for row in as_json("compare", run.location, run.location)["differences"]
    }


def test_a_model_is_scored_on_tasks_that_its_campaign_did_not_have(run: Run, tmp_path: Path) -> None:
    data = run.campaign.evaluation["data"]
    file = tmp_path / "tasks.yaml"
    tasks = {
        "evaluation": {"kind": "classification", "data": data},
        "objectives": [
            {"name": "noise", "task": "noise", "metric": "accuracy"},
            {"name": "doubt", "task": "parity", "metric": "loss"},
        ],
    }
    file.write_text(yaml.safe_dump(tasks))
    before = len(run.ledger.measurements("test"))
    knee = run.front.knee()
    shown = as_json("score", run.location, "--knee", "--tasks", file)
    found = rescore(run, knee, file)
    assert shown["model"] == f"trial:{knee.number}"
    values = {row["model"]: row for row in shown["models"]}
    assert values.keys() == {"base", "expert:rot90", "expert:parity", "uniform", run.best_scalar, shown["model"]}
    model, _ = run.materialize(knee)
    plan_items = np.arange(found.num_items["noise"])
    evaluator = ClassificationEvaluator(ClassificationOptions(data=data), {"noise": ["accuracy"]})
    expected = evaluator.score(model, "noise", plan_items)["accuracy"]
    assert values[shown["model"]]["value/noise"] == pytest.approx(float(expected.mean()), abs=1e-7)
    for row in shown["objectives"]:
        sign = 1 if row["direction"] == "max" else -1
        experts = {name: values[name][f"value/{row['objective']}"] for name in ("expert:rot90", "expert:parity")}
        assert row["other"] == max(experts, key=lambda name: sign * experts[name])
        assert row["items"] == found.num_items["noise" if row["objective"] == "noise" else "parity"]
    assert len(run.ledger.measurements("test")) == before
    for changes, message in (
        ({"budget": {"evaluations": 3}}, "budget: expected evaluation and objectives alone"),
        ({"evaluation": {**tasks["evaluation"], "split": {"test": 1.0}}}, "leave split out"),  # type: ignore[dict-item]
        ({"objectives": [{"name": "n", "task": "noise"}]}, r"objectives\[0\]"),
    ):
        file.write_text(yaml.safe_dump({**tasks, **changes}))
        with pytest.raises(CampaignError, match=message):
            rescore(run, knee, file)


def test_a_model_is_picked_within_floors_and_ceilings(run: Run) -> None:
    values = {
        trial.number: {n: s.value for n, s in trial.measurement.scores.items()}
        for trial in run.front
        if trial.measurement
    }
    floor = sorted(of["parity"] for of in values.values())[len(values) // 2]
    kept = {number for number, of in values.items() if of["parity"] >= floor}
    picked = run.pick(minimum={"parity": floor})
    assert picked == run.pick(at_knee=True, minimum={"parity": floor})
    assert picked.number in kept
    best = min(kept, key=lambda number: values[number]["turned"])
    assert run.pick(preference={"parity": 0.0}, minimum={"parity": floor}).number == best
    ceiling = min(of["turned"] for of in values.values())
    assert run.pick(maximum={"turned": ceiling}).number == next(
        n for n, of in values.items() if of["turned"] == ceiling
    )
    highest = max(of["parity"] for of in values.values())
    for bounds, message in (
        ({"minimum": {"parity": 2.0}}, rf"--min parity=2: .*the best of {len(values)} has {highest:.4g}"),
        ({"maximum": {"turned": -1.0}}, "--max turned=-1: expected a model on the front that keeps it, found none"),
        ({"minimum": {"partiy": 0.0}}, "no objective 'partiy'; did you mean 'parity'"),
        ({"trial": 0, "minimum": {"parity": 0.0}}, "--min and --max are for --knee and --prefer"),
    ):
        with pytest.raises(RunError, match=message):
            run.pick(**bounds)
    if len(values) > 1:
        with pytest.raises(RunError, match=f"--min parity={highest:g} --max turned={ceiling:g}: each is kept by some"):
            run.pick(minimum={"parity": highest}, maximum={"turned": ceiling})


def test_status_of_a_run_that_is_driven(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    """It is the one that is shown among others; once nobody drives any, the one written last."""
    runs = tmp_path / "runs"
    campaign = make_campaign(search=[{"proposer": "sobol"}], budget={"evaluations": 6})
    search(campaign, runs / "before", watcher=Silent())
    seen = []

    class Looking(Silent):
        def advance(self, trial: object) -> None:
            super().advance(trial)
            if getattr(trial, "number", None) == 3:
                seen.append(as_json("status", runs)["runs"])
                seen.append(invoke("status", runs))

    search(campaign, runs / "driven", watcher=Looking())
    (shown,), text = seen
    assert (shown["name"], shown["state"]) == (None, "running")
    assert shown["location"] == str(runs / "driven")
    assert shown["counts"] == {"scored": 4, "stopped": 0, "failed": 0, "pending": 0}
    assert shown["results_per_second"] > 0
    assert shown["seconds_left"] == pytest.approx(2 / shown["results_per_second"])
    assert [row["trial"] for row in shown["latest"]] == [0, 1, 2, 3]
    assert "4 of 6 (67%)" in text
    assert f"driven by {shown['holder']}" in text
    (status,) = current_status(locate(runs))
    assert (status.summary.location.folder, status.rate) == (runs / "driven", None)
    with pytest.raises(RunError, match="expected a folder with runs, found none"):
        current_status(locate(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run has begun"):
        current_status(locate(tmp_path / "empty"))


def test_a_front_that_grows_after_its_test_scores_is_shown(
    make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    """The old members have test values, the new ones have none yet."""
    wide = {"search": [{"proposer": "sobol"}], "objectives": OBJECTIVES}
    search(make_campaign(**wide, budget={"evaluations": 1}), tmp_path / "run", watcher=Silent())
    with pytest.raises(Interrupt):
        search(make_campaign(**wide, budget={"evaluations": 20}), tmp_path / "run", watcher=Interrupting(after=15))
    run = evomerge.open(tmp_path / "run")
    new = [trial.number for trial in run.front if f"trial:{trial.number}" not in run.tested]
    assert new
    assert "models without numbers are new" in invoke("front", tmp_path / "run")
    assert run.front_frame().set_index("trial").loc[new, "test/parity"].isna().all()
    assert f"<td>trial {new[0]}</td><td></td>" in run._repr_html_()
    (drawn,) = (trace for trace in evomerge.figures.front(run).data if trace.name == "front")
    assert len(drawn.x) == len(run.front)


def test_nothing_is_shown_before_anything_is_scored(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    class Early(Interrupting):
        def advance(self, trial: object) -> None:
            raise Interrupt

    with pytest.raises(Interrupt):
        search(make_campaign(), tmp_path / "run", watcher=Early(after=1))
    with pytest.raises(RunError, match="nothing has been scored yet"):
        invoke("front", tmp_path / "run")
    assert "the reference models come first" in invoke("status", tmp_path / "run")
    with pytest.raises(RunError, match="no trial has been scored yet"):
        evomerge.figures.front(evomerge.open(tmp_path / "run"))


def test_frames_hold_every_trial_with_its_numbers(run: Run) -> None:
    trials, front = run.trials_frame(), run.front_frame()
    assert list(trials["trial"]) == list(range(12))
    assert set(trials.columns) == set(front.columns)
    assert list(front["trial"]) == [trial.number for trial in run.front]
    assert trials["test/parity"].notna().sum() == len(run.front) == trials["on_front"].sum()
    for trial in run.trials:
        row = trials.iloc[trial.number]
        for held, number in run.numbers_of(trial):
            assert row[f"coefficient/{held['expert']}/{held['group']}"] == number
        assert trial.measurement is not None
        assert row["search/turned"] == trial.measurement.scores["turned"].value
    assert f"trial {run.front[0].number}</td>" in run._repr_html_()
    assert repr(run.front).startswith(f"Front of {len(run.front)} trials: ")


def test_figures_show_the_runs_own_numbers(run: Run) -> None:
    front, *_ = (trace for trace in evomerge.figures.front(run).data if trace.name == "front")
    assert list(front.x) == [run.tested[f"trial:{trial.number}"].scores["parity"].value for trial in run.front]
    assert list(front.error_y.array) == [
        run.tested[f"trial:{trial.number}"].scores["turned"].stderr for trial in run.front
    ]
    assert evomerge.figures.hypervolume(run).data[0].y[-1] == pytest.approx(run.hypervolume())
    knee = run.front.knee()
    heat = evomerge.figures.coefficients(run, knee.number).data[0]
    assert sorted(heat.z.ravel()) == pytest.approx(sorted(number for _, number in run.numbers_of(knee)))
    lines = evomerge.figures.parallel_coordinates(run).data[0]
    assert sum(lines.line.color) == len(run.front)
    expected = maximized(run.searched[f"trial:{run.front[-1].number}"], run.objectives)
    assert list(lines.dimensions[0]["values"]).count(expected[0]) >= 1


def test_a_live_model_is_the_one_that_was_tested(run: Run, small_text: FamilySummary) -> None:
    trial = run.front[0]
    model, processor = run.materialize(trial)
    assert processor is None
    tested = run.tested[f"trial:{trial.number}"]
    assert tensors_hash(model) == tested.weights
    tokenizer = load_processor(open_checkpoint("base", str(small_text.path / "base")))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"


def test_the_example_runs(
    small_digits: FamilySummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = yaml.safe_load(small_digits.campaign.read_text()) | {"budget": {"evaluations": 8}}
    for name in ("base", "experts", "data"):
        (tmp_path / name).symlink_to(small_digits.path / name)
    (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(campaign))
    monkeypatch.setattr(sys, "argv", ["python_api.py", str(tmp_path), str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / "python_api.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^trial \d+ on \w+: \[(\d+, ){7}\d+\], labels", printed, flags=re.MULTILINE)
    assert {path.name for path in (tmp_path / "out").glob("*.html")} == {"front.html", "coefficients.html"}
