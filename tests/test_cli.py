"""The command line as a user meets it: a real process where that matters, its output, its exit status."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel
from typed_command import Typed

from evomerge.families.family import FamilySummary
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import FILE_NAME, locate
from evomerge.records import Candidate
from evomerge.run.run import open_run

ROOT = Path(__file__).parent.parent


def evomerge(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "evomerge.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def run_folder(digits4: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short campaign of the real family, run by the command."""
    folder = tmp_path_factory.mktemp("cli")
    sections = yaml.safe_load(digits4.campaign.read_text())
    sections["base"] = str(digits4.path / "base")
    sections["experts"] = {name: str(digits4.path / "experts" / name) for name in ("rot90", "parity")}
    sections["objectives"] = [
        objective for objective in sections["objectives"] if objective["name"] in ("rot90", "parity")
    ]
    sections["evaluation"]["data"] = str(digits4.path / "data")
    sections["budget"] = {"evaluations": 25}
    (folder / "campaign.yaml").write_text(yaml.safe_dump(sections))
    done = evomerge("search", "campaign.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "on the front, scores on test items" in done.stdout
    assert re.search(
        r"^search   gradient_front 6 in 16 dimensions .*surrogate 19 in 16 dimensions", done.stdout, re.MULTILINE
    )
    assert "next     evomerge report runs/digits4" in done.stdout
    return folder / "runs" / "digits4"


def test_help_lists_the_commands() -> None:
    """That it answers at once is seen to by test_architecture: it loads nothing heavy."""
    done = evomerge("--help")
    assert done.returncode == 0
    assert all(
        command in done.stdout
        for command in ("check", "search", "front", "status", "show", "compare", "score", "export", "merge", "families")
    )


def test_the_same_command_again_says_that_it_is_finished(run_folder: Path, typed: Callable[..., Typed]) -> None:
    done = typed("search", "campaign.yaml", cwd=run_folder.parent.parent)
    assert done.returncode == 0
    assert "this campaign had finished: nothing was done" in done.stdout


def test_ctrl_c_says_how_to_go_on(digits4: FamilySummary, tmp_path: Path) -> None:
    """Interrupted in the midst of its search, the command ends with status 130 and keeps what it has."""
    command = [sys.executable, "-m", "evomerge.cli", "search", str(digits4.campaign), "--run", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180  # a busy machine takes a minute to its third trial
    while num_finished(tmp_path / "run") < 3 and time.monotonic() < deadline:
        time.sleep(0.3)  # each look takes time from the search
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip() == "evomerge: stopped; the same command goes on where this one ended"
    assert 3 <= num_finished(tmp_path / "run") < 60


def num_finished(folder: Path) -> int:
    """How many trials have their result, read while the run goes on."""
    return sum(trial.order is not None for trial in open_run(folder).trials) if Ledger.exists(locate(folder)) else 0


def test_check_says_what_will_happen(digits4: FamilySummary, typed: Callable[..., Typed]) -> None:
    done = typed("check", digits4.campaign)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    for fact in (
        "4 experts (rot90, invert, parity, mod5)",
        "32 dimensions over 8 groups",
        "surrogate 52 in 32 dimensions",
        "104 tensors",
        "rot90 0.3, invert 0.3, parity 0.3, mod5 0.3",
        "MB",
        "(timed)",
        "(timed, a weighted sum); moving its",
        "GB/s (measured)",
    ):
        assert fact in text
    assert re.search(r"parity +│ parity +│ accuracy \(max\) +│ +180 │ +360 │ +360", done.stdout)


def test_front_prints_the_table_beside_the_references(run_folder: Path, typed: Callable[..., Typed]) -> None:
    done = typed("front", run_folder, "--all")
    assert done.returncode == 0, done.stderr
    run = open_run(run_folder)
    for label in (
        "base",
        "expert:rot90",
        "uniform",
        run.best_scalar,
        "knee",
        *(f"trial {t.number}" for t in run.front),
    ):
        assert label in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_export_of_the_knee_is_the_model_that_was_scored(run_folder: Path, tmp_path: Path) -> None:
    done = evomerge("export", run_folder, "--knee", "--out", tmp_path / "merged", "--verify")
    assert done.returncode == 0, done.stderr
    assert "equal to the last digit" in done.stdout
    model, report = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "README.md",
        "config.json",
        "front.png",
        "model.safetensors",
        "recipe.yaml",
    }
    again = evomerge("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    first, second = (tmp_path / name / "model.safetensors" for name in ("merged", "again"))
    assert first.read_bytes() == second.read_bytes()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "mergekit cannot make this merge: tensors have other names in the checkpoint's files" in card


def test_export_by_preference_and_by_number(run_folder: Path, tmp_path: Path, typed: Callable[..., Typed]) -> None:
    run = open_run(run_folder)
    for words, expected in (
        (("--prefer", "rot90=100,parity=1"), run.front[0].number),
        (("--trial", "3"), 3),
    ):
        done = typed("export", run_folder, *words, "--out", tmp_path / words[1])
        assert done.returncode == 0, done.stderr
        assert f"(trial {expected} of" in done.stdout


def test_report_is_one_file_that_asks_for_nothing(
    run_folder: Path, tmp_path: Path, typed: Callable[..., Typed]
) -> None:
    done = typed("report", run_folder, "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 8_000_000
    assert not re.search(r"""(src|href)=["']https?://""", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    overview = json.loads(re.findall(r'id="part-overview">(.*?)</script>', page)[0])
    assert overview["front"] == [trial.number for trial in open_run(run_folder).front]
    assert overview["command"] == str(run_folder)


MISTAKES = [
    (("search", "nowhere.yaml"), "nowhere.yaml: no such file"),
    (("front", "nowhere"), "nowhere: expected a run folder with a ledger, found none"),
    (("export", "RUN", "--out", "x"), "pick one model: --trial N, --knee, or --prefer"),
    (("export", "RUN", "--knee", "--trial", "1", "--out", "x"), "pick one model"),
    (("export", "RUN", "--trial", "99", "--out", "x"), "no trial 99; there are trials 0 to 24"),
    (("export", "RUN", "--prefer", "rot91=2", "--out", "x"), "no objective 'rot91'; did you mean 'rot90'?"),
    (("export", "RUN", "--prefer", "rot90=-1", "--out", "x"), "expected a weight of 0 or more, found -1"),
    (("export", "RUN", "--prefer", "rot90", "--out", "x"), "expected NAME=NUMBER,... such as a=2,b=1, found 'rot90'"),
    (("export", "RUN", "--prefer", "rot90=0,parity=0", "--out", "x"), "all weights are 0"),
    (("export", "RUN", "--min", "rot90=2", "--out", "x"), "--min rot90=2: expected a model on the front that keeps it"),
    (("export", "RUN", "--max", "rot90", "--out", "x"), "--max: expected NAME=NUMBER,... such as a=2,b=1"),
    (("show", "RUN", "99"), "no trial 99; there are trials 0 to 24"),
    (("front", "RUN", "--json", "--csv"), "--json and --csv: expected one of them"),
    (("export", "RUN", "--knee", "--out", "RUN"), "expected a folder that is new or empty"),
    (("export", "RUN", "--knee", "--out", "x", "--shard-size", "5"), "--shard-size: expected a size such as 5GB"),
    (("export", "RUN", "--knee", "--out", "x", "--private"), "--private: says how --push creates its repository"),
    (("export", "RUN", "--knee", "--out", "x", "--push", "me"), "--push: expected OWNER/NAME such as someone/merged"),
    (("merge", "nowhere.yaml", "--out", "x"), "nowhere.yaml: no such file"),
    (("import", "nowhere.yaml", "--out", "x"), "nowhere.yaml: no such file"),
    (("families", "make", "digitz", "--out", "x"), "family 'digitz' is unknown; did you mean 'digits'?"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_users_mistake_is_one_line_and_status_2(
    run_folder: Path, tmp_path: Path, words: tuple[str, ...], message: str, typed: Callable[..., Typed]
) -> None:
    done = typed(*(str(run_folder) if word == "RUN" else word for word in words), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_mistake_in_the_file_reaches_the_user(
    campaign_file: Callable[..., Path], typed: Callable[..., Typed]
) -> None:
    done = typed("check", campaign_file(space={"coefficient": {"low": 0.0, "hihg": 1.0}}))
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("space.coefficient.hihg: unknown key; did you mean 'high'?")


@pytest.fixture
def larger(run_folder: Path, tmp_path: Path) -> Path:
    """The campaign of that run with a larger budget: the search has something to write."""
    sections = yaml.safe_load((run_folder.parent.parent / "campaign.yaml").read_text())
    path = tmp_path / "larger.yaml"
    path.write_text(yaml.safe_dump({**sections, "budget": {"evaluations": 30}}))
    return path


@pytest.mark.parametrize("command", ["search", "front", "runs"])
def test_a_run_on_a_read_only_medium(
    command: str, run_folder: Path, larger: Path, small_disk: Path, typed: Callable[..., Typed]
) -> None:
    """It is read as any other; a search says in a line that it cannot be written."""
    shutil.copytree(run_folder, small_disk / "run")
    before = (small_disk / "run" / FILE_NAME).read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    if command == "search":
        for where in ("run", "another"):
            done = typed("search", larger, "--run", small_disk / where)
            assert done.returncode == 2
            assert re.search(
                "cannot (be written|write a run there) .*read-?only.*(give access|another place)", done.stderr, re.I
            )
            assert len(done.stderr.splitlines()) == 1
    else:
        done = typed(command, small_disk / ("run" if command == "front" else ""))
        assert done.returncode == 0, done.stderr
        assert "digits4" in done.stdout
    assert (small_disk / "run" / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("command", ["search", "front"])
def test_a_ledger_of_a_newer_version_is_left_alone(
    command: str, run_folder: Path, larger: Path, tmp_path: Path, typed: Callable[..., Typed]
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    with closing(sqlite3.connect(tmp_path / "run" / FILE_NAME)) as connection:
        connection.execute("UPDATE evomerge_schema SET version = 99")
        connection.commit()
    before = (tmp_path / "run" / FILE_NAME).read_bytes()
    done = typed(*(["search", larger, "--run"] if command == "search" else ["front"]), tmp_path / "run")
    assert done.returncode == 2
    assert re.search(r"expected schema \d+, found 99; use the evomerge that wrote it\n$", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "run" / FILE_NAME).read_bytes() == before


def test_a_second_driver_is_told_who_drives(
    run_folder: Path, larger: Path, tmp_path: Path, typed: Callable[..., Typed]
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    with closing(Ledger.drive(locate(tmp_path / "run"), "digits4")) as ledger:
        done = typed("search", larger, "--run", tmp_path / "run")
        assert done.returncode == 2
        assert f"process {os.getpid()} on" in done.stderr
        assert "is driving this run; its lease ends at" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        ledger.issue(0, 100, Candidate(point=(0.5,)))


def test_merge_says_what_a_mergekit_file_has_in_vain(
    digits4: FamilySummary, tmp_path: Path, typed: Callable[..., Typed]
) -> None:
    models = [{"model": str(digits4.path / "experts" / name)} for name in ("rot90", "parity")]
    sections = {"merge_method": "karcher", "models": models, "parameters": {"int8_mask": True}}
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(sections))
    done = typed("merge", "mergekit.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note     parameters.int8_mask: saves memory in mergekit; has no effect here" in done.stdout
    done = typed("import", "mergekit.yaml", "--out", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = typed("merge", "recipe.yaml", "--out", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()
    done = typed("merge", tmp_path / "out" / "mergekit.yaml", "--out", tmp_path / "third")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == one.read_bytes()


def test_families_list_and_cached_make(digits4: FamilySummary, typed: Callable[..., Typed]) -> None:
    assert "digits4" in typed("families", "list").stdout
    done = typed("families", "make", "digits4", "--out", digits4.path)
    assert done.returncode == 0, done.stderr
    assert "was there already" in done.stdout
    assert json.loads((digits4.path / "family.json").read_text())["name"] == "digits4"


@pytest.mark.parametrize("command", ["check", "search"])
def test_experts_that_do_not_suit_the_operator_are_a_mistake_found_before_any_candidate(
    command: str, campaign_file: Callable[..., Path], tmp_path: Path, typed: Callable[..., Typed]
) -> None:
    done = typed(command, campaign_file(operator={"name": "slerp"}), cwd=tmp_path)
    assert done.returncode == 2
    assert "slerp: expected one expert (the base is the other end), found" in done.stderr


def test_the_operators_are_listed_with_what_can_be_searched(typed: Callable[..., Typed]) -> None:
    done = typed("operators")
    assert done.returncode == 0
    assert "task_arithmetic" in done.stdout
    assert "density = 0.2 [0.05, 1]" in done.stdout
