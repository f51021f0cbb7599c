"""Runs in a database as in a folder: the same story, the same commands; and the list of all."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from silent_watcher import Interrupt, Interrupting, Silent
from sqlalchemy import update
from typer.testing import CliRunner

from evomerge.campaign.campaign import Campaign
from evomerge.cli import app
from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger import tables
from evomerge.ledger.database import Database
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import FILE_NAME, locate
from evomerge.records import Trial
from evomerge.run.run import Run, open_run
from evomerge.run.runs import summarize_runs
from evomerge.run.search import search

SOBOL = {"search": [{"proposer": "sobol"}], "budget": {"evaluations": 5}}


def story(run: Run) -> list[tuple[object, ...]]:
    return [
        (trial.number, trial.candidate, trial.order, trial.measurement and trial.measurement.scores["parity"].value)
        for trial in run.trials
    ]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_run_in_a_database_is_interrupted_resumed_and_listed(
    make_campaign: Callable[..., Campaign], tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    campaign = make_campaign(**SOBOL)
    expected = search(campaign, tmp_path / "folder", watcher=Silent())
    url = f"sqlite:///{tmp_path}/all.sqlite" if kind == "sqlite" else request.getfixturevalue("empty_postgresql")
    with pytest.raises(Interrupt):
        search(campaign, url, watcher=Interrupting(after=2))
    (stopped,) = summarize_runs(locate(url))
    assert (stopped.name, stopped.state, stopped.num_finished, stopped.num_evaluations) == (
        campaign.name,
        "stopped",
        2,
        5,
    )
    run = search(campaign, url, watcher=Silent())
    assert run.location.name == campaign.name
    assert story(run) == story(expected)
    search(campaign, f"{url}#again", watcher=Silent())
    assert story(open_run(f"{url}#again")) == story(expected)
    again, first = summarize_runs(locate(url))
    assert (again.location.name, first.location.name) == ("again", campaign.name)
    assert (again.state, again.num_finished, again.holder) == ("finished", 5, None)
    assert again.hypervolume == first.hypervolume == expected.hypervolume()
    with pytest.raises(RunError, match=f"holds 2 runs; name one, such as .*: {campaign.name}, again"):
        open_run(url)
    report = CliRunner().invoke(app, ["report", f"{url}#again"], catch_exceptions=True)
    assert "a run in a database has no folder for report.html; say where with --out" in str(report.exception)


def test_a_driver_that_was_taken_over_stops_and_the_run_goes_on(
    make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    """After its third result another driver follows it, and issues a trial."""
    campaign = make_campaign(**SOBOL)
    location = locate(tmp_path / "run")
    expected = search(campaign, tmp_path / "whole", watcher=Silent())

    class TakenOver(Silent):
        def advance(self, trial: object) -> None:
            super().advance(trial)
            if isinstance(trial, Trial) and trial.number == 2:
                with closing(Database(location)) as database, database.writing() as connection:
                    connection.execute(update(tables.leases).values(expires=0.0))
                successors.append(Ledger.drive(location, "successor"))
                successors[0].issue(0, 3, expected.trials[3].candidate)

    successors: list[Ledger] = []
    with pytest.raises(EvoMergeError, match="has taken this run over") as caught:
        search(campaign, location, watcher=TakenOver())
    assert caught.value.exit_status == 1
    assert successors[0].holder() is not None
    successors[0].close()
    assert story(search(campaign, location, watcher=Silent())) == story(expected)


def test_the_runs_of_a_folder_are_listed(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    """Finished, driven at the moment, of an earlier version, and what is none."""
    runs = tmp_path / "all"
    finished = search(make_campaign(**SOBOL), runs / "finished", watcher=Silent())
    for name, statement in (("old", "CREATE TABLE %s (schema_version INTEGER)"), ("none", "")):
        (runs / name).mkdir()
        if statement:
            with closing(sqlite3.connect(runs / name / FILE_NAME)) as connection:
                for table in ("run", "trials", "measurements", "scores"):
                    connection.execute(statement % table)
                connection.execute("INSERT INTO run VALUES (2)")
                connection.commit()
    seen = []

    class Looking(Silent):
        def advance(self, trial: object) -> None:
            if trial is not None and not seen:
                seen.extend(summarize_runs(locate(runs)))

    search(
        make_campaign(**{**SOBOL, "objectives": [{"name": "parity", "task": "parity", "metric": "accuracy"}]}),
        runs / "running",
        watcher=Looking(),
    )
    first, old, running = seen
    assert [str(summary.location) for summary in seen] == [str(runs / name) for name in ("finished", "old", "running")]
    assert (first.state, first.num_on_front, first.best) == ("finished", len(finished.front), None)
    assert first.hypervolume == finished.hypervolume()
    assert "schema 2" in str(old.problem)
    assert (running.state, running.num_finished) == ("running", 1)
    assert running.holder is not None
    best = open_run(runs / "running").trials[0].measurement
    assert best is not None
    assert running.best == best.scores["parity"].value

    shown = CliRunner().invoke(app, ["runs", str(runs)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("5 of 5") == 2
    assert f"not read  {runs / 'old'} was written by an earlier evomerge" in shown.output
    rows = json.loads(CliRunner().invoke(app, ["runs", str(runs), "--json"]).output)["runs"]
    assert [row["state"] for row in rows] == ["finished", "", "finished"]
    assert rows[0]["hypervolume"] == finished.hypervolume()
    with pytest.raises(RunError, match="expected a folder with runs, found none"):
        summarize_runs(locate(tmp_path / "nowhere"))
