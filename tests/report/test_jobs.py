"""What is said of submitted searches, without a cluster; on one, see test_submit.py."""

import json

import pytest

from evomerge.ledger.location import locate
from evomerge.report.jobs import all_jobs, one_job, submitted
from evomerge.report.tables import Shown, show, showing
from evomerge.submit import Submitted
from evomerge.workers.jobs import Job

DONE = Job(name="merges-1", run="/runs/merges", state="succeeded", started=30.0, ended=120.0, problem="")
FAILED = Job(name="merges-2", run="/runs/merges", state="failed", started=60.0, ended=61.0, problem="no such folder")


def said(shown: Shown, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    """Return what people and scripts are told."""
    show(shown)
    with showing(as_json=True) as to_scripts:
        to_scripts(shown)
    text, _, answer = capsys.readouterr().out.partition("{\n")
    return text, json.loads("{" + answer)


def test_what_was_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    found = Submitted("merges-1", locate("postgresql://me:secret@there/merges#one"), "http://head:8265")
    text, answer = said(submitted(found, " --address http://head:8265"), capsys)
    run = "postgresql://me:***@there/merges#one"
    assert answer == {"job": "merges-1", "server": "http://head:8265", "run": run}
    assert "next     evomerge job logs merges-1 --follow --address http://head:8265\n" in text
    assert "secret" not in text


def test_what_became_of_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    text, answer = said(all_jobs([FAILED, DONE], "http://head:8265"), capsys)
    assert answer["server"] == "http://head:8265"
    assert answer["jobs"] == [
        {
            "job": "merges-2", "state": "failed", "is_over": True, "submitted": "1970-01-01T00:01:00+00:00",
            "seconds": 1.0, "run": "/runs/merges", "problem": "no such folder",
        },
        {
            "job": "merges-1", "state": "succeeded", "is_over": True, "submitted": "1970-01-01T00:00:30+00:00",
            "seconds": 90.0, "run": "/runs/merges", "problem": None,
        },
    ]  # fmt: skip
    assert "0:01:30" in text
    _, of_one = said(one_job(FAILED, "http://head:8265", ""), capsys)
    assert of_one == {"server": "http://head:8265", "jobs": answer["jobs"][:1]}  # type: ignore[index]


def test_nothing_was_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    text, answer = said(all_jobs([], "http://head:8265"), capsys)
    assert answer == {"server": "http://head:8265", "jobs": []}
    assert text.startswith("nothing was submitted to http://head:8265")
