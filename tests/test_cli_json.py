"""``--json``: which commands have it, what each says, and that nothing else comes to stdout."""

import io
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from silent_watcher import Silent
from typed_command import Typed

from evomerge.campaign.campaign import read_campaign
from evomerge.cli import app
from evomerge.errors import InputError
from evomerge.families.family import FamilySummary
from evomerge.ledger.location import FILE_NAME
from evomerge.report.console import make_progress
from evomerge.report.tables import Shown, showing
from evomerge.run.run import Run
from evomerge.run.search import search

WITHOUT = {
    "search": "what it finds is the run: front --json",
    "report": "what it makes is a page",
    "ui": "what it makes is a page",
    "import": "what it makes is a file",
    "job logs": "what a job prints is not ours",
    "job stop": "what becomes of the job: job status --json",
}
ON_A_CLUSTER = {"submit", "job status"}  # see test_submit.py and report/test_jobs.py


@pytest.fixture(scope="module")
def run(small_digits: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("json")
    sections = yaml.safe_load(small_digits.campaign.read_text())
    sections |= {
        "base": str(small_digits.path / "base"),
        "experts": {name: str(small_digits.path / "experts" / name) for name in small_digits.experts},
        "search": [{"proposer": "sobol"}],
        "budget": {"evaluations": 5},
    }
    sections["evaluation"]["data"] = str(small_digits.path / "data")
    (folder / "campaign.yaml").write_text(yaml.safe_dump(sections))
    return search(read_campaign(folder / "campaign.yaml"), folder / "run", watcher=Silent())


@pytest.fixture
def answered(run: Run, small_digits: FamilySummary, tmp_path: Path, typed: Callable[..., Typed]) -> Callable[..., Any]:
    """Type a command with --json; RUN, FILE, FAMILY and TMP are places. Return what it says, its status and stderr."""
    folder = Path(str(run.location)).parent
    places = {"RUN": str(run.location), "FILE": str(folder / "campaign.yaml"), "TMP": str(tmp_path)}
    places |= {"FAMILY": str(small_digits.path)}

    def answer(line: str) -> tuple[Any, int, str]:
        words = line.split()
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        done = typed(*words, "--json")
        return json.loads(done.stdout, parse_constant=pytest.fail) if done.stdout else None, *done[::2]

    return answer


def commands(group: Any, before: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield every command with its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", [option for parameter in command.params for option in parameter.opts]


def test_every_command_that_says_something_says_it_to_scripts() -> None:
    options = dict(commands(typer.main.get_command(app)))
    having = {name for name in options if "--json" in options[name]}
    assert options.keys() - having == WITHOUT.keys()
    answers = {name.removeprefix("test_").removesuffix("_answers") for name in globals() if name.endswith("_answers")}
    assert {name.replace(" ", "_") for name in having - ON_A_CLUSTER} == answers


def test_check_answers(answered: Callable[..., Any], run: Run) -> None:
    found, status, errors = answered("check FILE")
    assert (status, errors) == (0, "")
    assert found["experts"] == list(run.campaign.experts)
    assert (found["num_dimensions"], found["equivalents"]) == (len(run.facts["stages"][0]["space"]), 5.0)
    assert [stage["evaluations"] for stage in found["stages"]] == [5]
    assert found["total_s"] == found["evaluation_s"] * (found["equivalents"] + found["reference_evaluations"])
    assert [row["objective"] for row in found["objectives"]] == [objective.name for objective in run.objectives]
    assert all(row["search"] == len(run.sources("search")[row["objective"]]) for row in found["objectives"])
    assert all(row["cosine"][row["expert"]] == pytest.approx(1.0) for row in found["task_vectors"])


def test_front_answers(answered: Callable[..., Any], run: Run) -> None:
    found, status, _ = answered("front RUN")
    assert (status, found["hypervolume"], found["knee"]) == (0, run.hypervolume(), run.front.knee().number)


def test_status_answers(answered: Callable[..., Any]) -> None:
    found, status, _ = answered("status RUN")
    assert (status, [row["num_finished"] for row in found["runs"]]) == (0, [5])


def test_show_answers(answered: Callable[..., Any], run: Run) -> None:
    found, status, _ = answered("show RUN 3")
    assert (status, found["trial"], len(found["numbers"])) == (0, 3, len(run.trials[3].point))


def test_compare_answers(answered: Callable[..., Any], run: Run) -> None:
    found, status, _ = answered("compare RUN 1 base")
    assert (status, [row["objective"] for row in found["objectives"]]) == (0, [one.name for one in run.objectives])


def test_score_answers(answered: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    task = {"name": "again", "task": run.objectives[0].task, "metric": "accuracy"}
    evaluation = {key: value for key, value in run.campaign.evaluation.items() if key != "split"}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"evaluation": evaluation, "objectives": [task]}))
    found, status, errors = answered("score RUN --trial 2 --tasks TMP/tasks.yaml")
    assert (status, errors, found["model"]) == (0, "", "trial:2")
    assert all(0 <= row["value/again"] <= 1 for row in found["models"])


def test_runs_answers(answered: Callable[..., Any], run: Run) -> None:
    found, status, _ = answered("runs RUN")
    assert (status, [row["hypervolume"] for row in found["runs"]]) == (0, [run.hypervolume()])


def test_mirror_answers(answered: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    for num_added in (5, 0):
        found, status, errors = answered("mirror RUN --optuna sqlite:///TMP/study.db")
        assert (status, errors) == (0, "")
        assert found == {
            "run": str(run.location),
            "storage": f"sqlite:///{tmp_path}/study.db",
            "study": run.campaign.name,
            "num_added": num_added,
            "num_held": 5,
        }


def test_replay_answers(answered: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    found, status, errors = answered("replay RUN")
    assert (status, errors, found["is_same"], found["num_proposals"]) == (0, "", True, 5)
    assert found["stages"] == [{"stage": 0, "proposer": "sobol", "num_proposals": 5, "difference": None}]
    shutil.copytree(str(run.location), tmp_path / "changed")
    moved = json.dumps({"point": [0.5] * len(run.trials[2].point), "descent": None, "memo": {}})
    with closing(sqlite3.connect(tmp_path / "changed" / FILE_NAME)) as ledger:
        ledger.execute(f"update evomerge_trials set candidate = '{moved}' where number = 2")
        ledger.commit()
    found, status, errors = answered("replay TMP/changed")
    assert (status, found["is_same"], errors.count("\n")) == (1, False, 1)
    assert "the proposals are not those of the record" in errors
    difference = found["stages"][0]["difference"]
    assert (difference["trial"], difference["recorded"], difference["proposed"]) == (2, 0.5, run.trials[2].point[0])


def test_export_answers(answered: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    found, status, errors = answered("export RUN --knee --out TMP/merged")
    knee = run.front.knee().number
    assert (status, errors, found["trial"], found["out"]) == (0, "", knee, str(tmp_path / "merged"))
    assert found["weights"] == run.tested[f"trial:{knee}"].weights
    assert found["files"] == sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert "verification" not in found
    found, status, errors = answered("export RUN --knee --out TMP/again --verify")
    assert (status, errors, found["trial"], found["verified"]) == (0, "", knee, True)
    values = {(row["split"], row["objective"]): row["rescored"] for row in found["verification"]}
    for objective in run.objectives:
        assert values["test", objective.name] == run.tested[f"trial:{knee}"].scores[objective.name].value


def test_merge_answers(answered: Callable[..., Any]) -> None:
    exported, *_ = answered("export RUN --trial 0 --out TMP/merged")
    found, status, errors = answered("merge TMP/merged/recipe.yaml --out TMP/again")
    assert (status, errors, found["weights"]) == (0, "", exported["weights"])
    assert (found["decisions"], found["notes"]) == ([], [])


def test_operators_answers(answered: Callable[..., Any]) -> None:
    found, status, _ = answered("operators")
    assert status == 0
    assert any(row["operator"] == "ties" for row in found["operators"])


def test_families_list_answers(answered: Callable[..., Any]) -> None:
    found, status, _ = answered("families list")
    assert (status, {row["family"] for row in found["families"]}) == (0, {"digits", "digits4", "orders", "text"})


def test_families_make_answers(answered: Callable[..., Any], digits4: FamilySummary) -> None:
    found, status, errors = answered(f"families make digits4 --out {digits4.path}")
    assert (status, errors, found["was_there"], found["experts"]) == (0, "", True, list(digits4.experts))
    scores = {row["model"]: row["value/rot90"] for row in found["models"]}
    assert scores == {model: of["rot90"] for model, of in digits4.scores.items()}


@pytest.mark.parametrize("command", ["check", "replay", "merge", "export", "front"])
def test_a_mistake_is_one_line_on_stderr_and_nothing_on_stdout(answered: Callable[..., Any], command: str) -> None:
    words = {"merge": "--out TMP/x", "export": "--knee --out TMP/x"}
    found, status, errors = answered(f"{command} nowhere {words.get(command, '')}")
    assert (found, status, errors.count("\n")) == (None, 2, 1)


def test_what_an_evaluator_prints_is_not_in_the_answer(
    answered: Callable[..., Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chatty.py").write_text(
        "class Evaluator:\n"
        "    def num_items(self, task):\n"
        "        return 8\n"
        "    def score(self, model, task, items):\n"
        "        print('{scoring')\n"
        "        return {'size': [float(item) for item in items]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sections = yaml.safe_load((Path(str(run.location)).parent / "campaign.yaml").read_text())
    sections["evaluation"] = {"kind": "callable", "factory": "chatty:Evaluator"}
    sections["objectives"] = [{"name": "size", "task": "any", "metric": "size", "direction": "max"}]
    (tmp_path / "chatty.yaml").write_text(yaml.safe_dump(sections))
    found, status, errors = answered("check TMP/chatty.yaml")
    assert (status, set(errors.split())) == (0, {"{scoring"})
    assert found["objectives"][0]["objective"] == "size"


class TestShowing:
    STEPS = (
        Shown(people=["first"], facts={"a": 1}, tables={"rows": [{"x": 1.0}, {"x": float("nan"), "y": [1, "z"]}]}),
        Shown(people=["second"], facts={"b": Path("c")}),
    )

    def test_people_see_each_step_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        with showing() as show:
            for step, line in zip(self.STEPS, ("first\n", "second\n"), strict=True):
                show(step)
                assert capsys.readouterr() == (line, "")

    def test_scripts_get_all_steps_in_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        with showing(as_json=True) as show:
            for step in self.STEPS:
                show(step)
            print("beside")
        printed, errors = capsys.readouterr()
        assert json.loads(printed) == {"a": 1, "rows": [{"x": 1.0}, {"x": None, "y": [1, "z"]}], "b": "c"}
        assert errors == "beside\n"

    def test_csv_is_the_first_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        with showing(as_csv=True) as show:
            show(self.STEPS[0])
        assert capsys.readouterr().out.splitlines() == ["x,y", "1.0,", 'nan,"[1, ""z""]"']

    def test_what_was_done_before_a_failure_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(InputError, match="no more"), showing(as_json=True) as show:
            show(self.STEPS[1])
            raise InputError("no more")
        assert json.loads(capsys.readouterr().out) == {"b": "c"}

    def test_both_forms_are_a_mistake(self) -> None:
        with pytest.raises(InputError, match="expected one of them"), showing(as_json=True, as_csv=True):
            pass

    @pytest.mark.parametrize("watched", [True, False])
    def test_a_bar_beside_what_scripts_read_is_for_eyes_alone(
        self, watched: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
        monkeypatch.setattr(stderr, "isatty", lambda: watched)
        assert not make_progress().disable
        with showing(as_json=True):
            assert make_progress().disable is not watched
