"""A campaign handed to a cluster: what is refused before, and a job's whole way on a real Ray cluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray_head import Head, free_ports
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.errors import CampaignError, InputError, RunError
from evomerge.families.family import FamilySummary
from evomerge.ledger.location import locate
from evomerge.run.run import open_run
from evomerge.submit import submit
from evomerge.workers.jobs import Job, JobServer

pytest.importorskip("ray")

EVALUATOR = '''
import os, time
from pathlib import Path

class Counted:
    """Scores tensors' sizes; from the 20th call on, only once the gate is open."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def num_items(self, task):
        return 10

    def score(self, model, task, items):
        number = len(list(self.folder.glob("call-*")))
        (self.folder / f"call-{os.getpid()}-{number}").touch()
        while number >= 20 and not (self.folder / "gate").exists():
            time.sleep(0.05)
        size = sum(float(parameter.norm()) for parameter in model.parameters())
        return {"size": [size + item for item in items]}
'''


@pytest.mark.parametrize(
    ("workers", "run", "error"),
    [
        ({"kind": "ray", "address": "ray://there:10001"}, None, "workers.address: a job scores on the cluster that it"),
        ({"kind": "ray", "runtime_env": {"working_dir": "gone"}}, None, "workers.runtime_env: gone: no such folder"),
        (None, "postgresql://me:secret@there/merges", r"postgresql://me:\*\*\*@there/merges#.*would see the password"),
        (None, "postgresql://me@there/merges?sslpassword=secret", "would see the password"),
        ({"kind": "ray"}, None, "no Ray job server at http://127.0.0.1:"),
    ],
)
def test_what_cannot_be_submitted(
    campaign_file: Callable[..., Path], workers: object, run: str | None, error: str
) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(InputError, match=error) as raised:
        submit(campaign_file(workers=workers), nobody, run=run)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"--address: expected an address that begins with http.*; found head:8265"):
        JobServer("head:8265")


def test_a_job_does_not_score_inline(campaign_file: Callable[..., Path]) -> None:
    with pytest.raises(CampaignError, match="--workers: a job scores on workers of its cluster; expected ray"):
        submit(campaign_file(), workers="inline")


def test_a_run_is_named_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(locate("runs/x").absolute) == f"{tmp_path}/runs/x"
    assert str(locate("sqlite:///all.sqlite#x").absolute) == f"sqlite:///{tmp_path}/all.sqlite#x"
    assert str(locate("postgresql://there/merges#x").absolute) == "postgresql://there/merges#x"


@pytest.fixture
def folder(tmp_path: Path, small_digits: FamilySummary) -> Path:
    """A campaign whose evaluator lies in a folder of its own, where no Python looks."""
    sections = {
        "name": "sizes",
        "base": str(small_digits.path / "base"),
        "experts": {name: str(small_digits.path / "experts" / name) for name in small_digits.experts[:2]},
        "objectives": [{"name": "size", "task": "any", "metric": "size", "direction": "max"}],
        "evaluation": {"kind": "callable", "factory": "only_here:Counted", "options": {"folder": str(tmp_path)}},
        "search": [{"proposer": "sobol"}],
        "budget": {"evaluations": 12},
        "workers": {"kind": "ray", "count": 2, "runtime_env": {"working_dir": "code"}},
    }
    (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(sections))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "only_here.py").write_text(EVALUATOR)
    return tmp_path


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_over(server: JobServer, name: str) -> Callable[[], bool]:
    return lambda: server.job(name).is_over


@pytest.mark.ray
def test_a_job_is_stopped_and_goes_on(ray_head: Head, folder: Path) -> None:
    """Its evaluator is found by driver and workers; what is under way when it stops takes longer than Ray would wait."""
    run, server = folder / "run", JobServer(ray_head.jobs)
    there = ("--address", ray_head.jobs)
    printed = command("submit", folder / "campaign.yaml", "--run", run, *there)
    job = server.jobs()[0]
    assert (job.run, job.is_over) == (str(run), False)
    assert f"evomerge job logs {job.name} --follow --address {ray_head.jobs}" in printed
    assert f"evomerge front {run}" in printed
    wait_until(lambda: len(list(folder.glob("call-*"))) > 20)
    with pytest.raises(RunError, match=f"{job.name} is driving this run"):
        submit(folder / "campaign.yaml", ray_head.jobs, run=str(run))
    assert "stops when what is under way has finished" in command("job", "stop", job.name, *there)
    wait_until(lambda: "stopping when what is under way has finished" in server.logs(job.name))
    time.sleep(4)  # Ray's own limit is 3
    (folder / "gate").touch()
    wait_until(is_over(server, job.name))
    assert f"{job.name}: stopped, submitted" in command("job", "status", job.name, *there)
    assert "evomerge: stopped; the same command goes on where this one ended" in command(
        "job", "logs", job.name, *there
    )
    trials = open_run(run).trials
    assert 0 < len(trials) < 12
    assert all(trial.measurement for trial in trials)

    again = submit(folder / "campaign.yaml", ray_head.jobs, run=str(run))
    assert "sobol 12 in" in command("job", "logs", again.job, "--follow", *there)
    assert server.job(again.job).state == "succeeded"
    assert open_run(run).is_finished
    assert len(open_run(run).trials) == 12
    listed = command("job", "status", *there)
    assert all(name in listed for name in (job.name, again.job, "stopped", "succeeded"))
    rows = json.loads(command("job", "status", *there, "--json"))["jobs"]
    assert {row["job"]: row["state"] for row in rows}.items() >= {job.name: "stopped", again.job: "succeeded"}.items()
    assert "was over: succeeded" in command("job", "stop", again.job, *there)


@pytest.mark.ray
def test_a_job_that_fails_says_why(ray_head: Head, folder: Path) -> None:
    sections = yaml.safe_load((folder / "campaign.yaml").read_text())
    (folder / "campaign.yaml").write_text(yaml.safe_dump(sections | {"base": "/not/on/the/cluster"}))
    server = JobServer(ray_head.jobs)
    name = submit(folder / "campaign.yaml", ray_head.jobs, run=str(folder / "run")).job
    wait_until(is_over(server, name))
    found: Job = server.job(name)
    assert found.state == "failed"
    assert found.problem.startswith("evomerge: base: expected a checkpoint folder")
    assert found.problem.endswith("found no folder /not/on/the/cluster")
    assert f"problem  {found.problem}" in command("job", "status", name, "--address", ray_head.jobs)


@pytest.mark.ray
def test_a_cluster_that_asks_for_a_token_is_told_apart(ray_head: Head) -> None:
    words = [sys.executable, "-m", "evomerge.cli", "job", "status", "--address", ray_head.jobs]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"evomerge: no Ray job server at {ray_head.jobs} (")
    assert "set RAY_AUTH_MODE=token if it asks for a token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.ray
def test_a_job_that_is_not_there(ray_head: Head) -> None:
    server = JobServer(ray_head.jobs)
    for ask in (server.job, server.stop, server.logs):
        with pytest.raises(InputError, match="no search 'gone' was submitted to"):
            ask("gone")
