"""The log of a run: what happened when, beside the run, and never in its way."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from silent_watcher import Interrupt, Interrupting

from evomerge.campaign.campaign import Campaign
from evomerge.driver.log import FILE_NAME, last_events
from evomerge.ledger.location import Location, locate
from evomerge.records import Trial
from evomerge.run.run import Run, open_run
from evomerge.run.search import search


@pytest.fixture
def campaign(make_campaign: Callable[..., Campaign]) -> Campaign:
    return make_campaign(
        search=[{"proposer": "sobol", "evaluations": 3}, {"proposer": "tpe"}], budget={"evaluations": 5}
    )


@pytest.fixture
def interrupted(campaign: Campaign, tmp_path: Path) -> Run:
    """A run of two sessions: the first stops after two trials."""
    with pytest.raises(Interrupt):
        search(campaign, tmp_path / "run", watcher=Interrupting(2))
    return search(campaign, tmp_path / "run")


def events(run: Run) -> list[dict[str, Any]]:
    return last_events(run.location, 1000)


def test_a_run_is_told_from_begin_to_end(interrupted: Run) -> None:
    told = events(interrupted)
    assert [event["event"] for event in told if event["event"] in ("begin", "resume", "end")] == [
        "begin",
        "end",
        "resume",
        "end",
    ]
    begin, failed, resume, finished = [event for event in told if event["event"] in ("begin", "resume", "end")]
    assert (begin["campaign"], begin["pid"], resume["workers"]) == (interrupted.campaign.name, os.getpid(), "inline")
    assert (failed["how"], finished["how"]) == ("failed", "finished")
    assert [event["stage"] for event in told if event["event"] == "stage"] == [0, 0, 1]
    assert {event["event"] for event in told} >= {"load", "search", "phase", "scored", "worker"}
    assert [event["time"] for event in told] == sorted(event["time"] for event in told)


def test_every_trial_is_issued_and_ends_with_its_times(interrupted: Run) -> None:
    told = events(interrupted)
    issued = [event["trial"] for event in told if event["event"] == "issued"]
    assert issued == [0, 1, 2, 3, 4]
    ended = {event["trial"]: event for event in told if event["event"] == "finished"}
    for trial in interrupted.trials:
        assert trial.measurement is not None
        event = ended[trial.number]
        assert event["values"] == {name: score.value for name, score in trial.measurement.scores.items()}
        assert event["seconds"].keys() == {"materialize", "evaluate"}
        assert event["fate"].keys() >= {"worker", "busy_s", "idle_s", "driver"}


class Filling(Interrupting):
    """Takes the log away while the search goes on, as a full or read-only disk would."""

    def __init__(self, log: Path) -> None:
        super().__init__(after=-1)
        self.log = log

    def phase(self, title: str, total: int, done: int) -> None:
        if title == "search":
            for descriptor in Path("/proc/self/fd").iterdir():
                if descriptor.exists() and descriptor.resolve() == self.log.resolve():
                    full = os.open("/dev/full", os.O_WRONLY)
                    os.dup2(full, int(descriptor.name))
                    os.close(full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_does_not_stop_the_run(campaign: Campaign, tmp_path: Path) -> None:
    run = search(campaign, tmp_path / "run", watcher=Filling(tmp_path / "run" / FILE_NAME))
    assert run.is_finished
    assert "issued" not in {event["event"] for event in events(run)}


def test_a_log_that_cannot_be_made_does_not_stop_the_run(campaign: Campaign, tmp_path: Path) -> None:
    (tmp_path / "run" / FILE_NAME).mkdir(parents=True)
    run = search(campaign, tmp_path / "run")
    assert run.is_finished
    assert events(run) == []


def test_of_a_log_the_last_events_are_read_past_what_is_torn(tmp_path: Path) -> None:
    location = locate(tmp_path)
    assert last_events(location, 3) == []
    lines = [json.dumps({"event": "issued", "trial": number, "padding": "x" * 500}) for number in range(400)]
    location.beside(FILE_NAME).write_text("\n".join(["[1]", *lines[:200], '{"event": "fin', "", *lines[200:]]))
    assert [event["trial"] for event in last_events(location, 3)] == [397, 398, 399]
    assert [event["trial"] for event in last_events(location, 1000)] == list(range(400))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/one", "runs/one/log.jsonl"),
        ("sqlite:////tmp/all.sqlite#one", "/tmp/one.log.jsonl"),
        ("postgresql://host/merges#one", "runs/one.log.jsonl"),
    ],
)
def test_where_it_lies(given: str, expected: str) -> None:
    location: Location = locate(given)
    assert location.beside(FILE_NAME) == Path(expected)


def test_the_times_of_a_real_run_add_up(interrupted: Run) -> None:
    from evomerge.run.times import times_of

    times = times_of(open_run(interrupted.location).trials)
    assert times.driver.keys() == {"propose", "record", "submit", "show", "wait"}
    (worker,) = times.workers
    assert worker.num_results == 5
    measured = [trial.measurement for trial in interrupted.trials if trial.measurement]
    assert worker.busy_s >= sum(sum(measurement.seconds.values()) for measurement in measured)
    assert times.driver["wait"] >= worker.busy_s  # in one process, the driver waits while its worker works
    assert all(isinstance(trial, Trial) and trial.fate["idle_s"] >= 0 for trial in interrupted.trials)
