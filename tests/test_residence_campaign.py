"""Campaigns whose task vectors are held in 8 bits, or whose model lies on several devices, from check to export."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.campaign.campaign import Campaign
from evomerge.check import check_campaign
from evomerge.errors import RunError
from evomerge.publish.export import export_trial, verify_export
from evomerge.report.checked import checked
from evomerge.report.tables import show
from evomerge.run.search import search

Make = Callable[..., Campaign]


def quiet(_: str) -> None:
    pass


def test_what_was_scored_in_8_bits_is_what_is_exported(make_campaign: Make, tmp_path: Path) -> None:
    changes = {
        "operator": {"name": "ties", "density": {"low": 0.1, "high": 0.9}},
        "space": {"coefficient": {"low": 0.1, "high": 1.0}},
        "search": [{"proposer": "sobol"}],
        "budget": {"evaluations": 4},
    }
    run = search(make_campaign(residence="int8", **changes), tmp_path / "run")
    best = run.pick(at_knee=True)
    export_trial(run, best, tmp_path / "merged", quiet)  # refuses tensors other than the tested ones
    rows = verify_export(run, best, tmp_path / "merged", quiet)
    assert rows
    assert all(row.rescored == row.recorded for row in rows)
    assert "int8: true" in (tmp_path / "merged" / "recipe.yaml").read_text()
    with pytest.raises(RunError, match="differs in residence"):
        search(make_campaign(**changes), tmp_path / "run")


def test_where_the_exact_task_vectors_lie_is_no_matter_of_meaning(make_campaign: Make) -> None:
    meanings = [make_campaign(residence=asked).meaning() for asked in ("auto", "resident", "host")]
    assert meanings[0] == meanings[1] == meanings[2]
    assert make_campaign(residence="int8").meaning() != meanings[0]


def test_check_says_how_candidates_are_merged(make_campaign: Make, capsys: pytest.CaptureFixture[str]) -> None:
    for residence, expected in (("auto", "resident on cpu; eager"), ("int8", "task vectors in 8 bits")):
        report = check_campaign(make_campaign(residence=residence, device="cpu"), quiet)
        show(checked(Path("campaign.yaml"), report))
        assert expected in " ".join(capsys.readouterr().out.split())
        assert report.merge_s > 0
    assert report.plan.size_bytes < check_campaign(make_campaign(device="cpu"), quiet).plan.size_bytes


def test_a_model_on_two_devices_is_searched_and_exported_as_on_one(
    make_campaign: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among its trials are descents."""
    stages = [{"proposer": "adamerging", "evaluations": 2, "loss": "ce", "steps": 2}, {"proposer": "sobol"}]
    trials = []
    for number, device in enumerate(("cpu", "cpu,cpu")):
        run = search(make_campaign(device=device, search=stages, budget={"evaluations": 6}), tmp_path / f"run{number}")
        measured = [(trial.candidate, trial.measurement) for trial in run.trials if trial.measurement]
        trials.append(
            [
                (of.point, at.arrival, {name: at.scores[name].items.tolist() for name in at.scores})
                for of, at in measured
            ]
        )
    assert len(trials[0]) == 6
    assert trials[0] == trials[1]
    best = run.pick(at_knee=True)
    export_trial(run, best, tmp_path / "merged", quiet)
    assert all(row.rescored == row.recorded for row in verify_export(run, best, tmp_path / "merged", quiet))
    show(checked(Path("campaign.yaml"), check_campaign(make_campaign(device="cpu,cpu"), quiet)))
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(
        r"on the host, base and experts too; of the merged model 0\.\d MB on cpu and 0\.\d MB on cpu;", said
    )
    assert re.search(r"at \d+ GB/s on the host and \d+ GB/s to the device \(measured\)", said)
