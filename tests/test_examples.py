"""The examples: manifests that KubeRay's API takes, a Slurm script that does what it says, commands that exist."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import free_ports

from evomerge.cli import app
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import locate
from evomerge.run.run import open_run
from evomerge.workers.jobs import RUN

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "slurm.sh"

# Fields of ray.io/v1 that the manifests may use, as KubeRay 1.3 declares them; of pods, those of Kubernetes' core/v1.
CLUSTER = {"rayVersion": str, "headGroupSpec": dict, "workerGroupSpecs": list, "enableInTreeAutoscaling": bool}
HEAD = {"rayStartParams": dict, "template": dict}
WORKERS = HEAD | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
JOB = {
    "entrypoint": str,
    "metadata": dict,
    "runtimeEnvYAML": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "rayClusterSpec": dict,
}
POD = {"containers": list, "volumes": list}
CONTAINER = {"name": str, "image": str, "envFrom": list, "ports": list, "resources": dict, "volumeMounts": list}


def require(section: dict[str, Any], fields: dict[str, type], optional: frozenset[str] = frozenset()) -> None:
    assert section.keys() <= fields.keys()
    assert fields.keys() - section.keys() <= optional
    for name, value in section.items():
        assert isinstance(value, fields[name]), name


@pytest.mark.parametrize("name", ["kuberay.yaml", "kuberay-job.yaml"])
def test_the_manifests_are_what_kuberay_takes(name: str) -> None:
    manifest = yaml.safe_load((EXAMPLES / name).read_text())
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == "ray.io/v1"
    cluster = manifest["spec"]
    if manifest["kind"] == "RayJob":
        require(manifest["spec"], JOB)
        cluster = manifest["spec"]["rayClusterSpec"]
    require(cluster, CLUSTER, frozenset({"enableInTreeAutoscaling"}))
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}" in constraints.splitlines()
    require(cluster["headGroupSpec"], HEAD)
    groups = cluster["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        require(group, WORKERS)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # map[string]string
        pod = group["template"]["spec"]
        require(pod, POD)
        [container] = pod["containers"]
        require(container, CONTAINER, frozenset({"ports"}))
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["envFrom"] == [{"secretRef": {"name": "evomerge"}}]  # no password stands in a manifest
        gpus = {resources.get("nvidia.com/gpu") for resources in container["resources"].values()}
        assert len(gpus) == 1  # Kubernetes gives what is requested and limited alike
    ports = {port["containerPort"] for port in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {6379, 8265, 10001} == ports


def test_the_job_runs_a_command_that_there_is_and_has_time_to_drain() -> None:
    spec = yaml.safe_load((EXAMPLES / "kuberay-job.yaml").read_text())["spec"]
    require_command(spec["entrypoint"].removeprefix("exec "))
    assert spec["metadata"][RUN] == shlex.split(spec["entrypoint"])[5]
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600


def test_commands_that_the_examples_name_exist() -> None:
    for path in (*EXAMPLES.iterdir(), ROOT / "docs" / "cluster.md"):
        lines = re.findall(r"^#?    +(evomerge .*?)(?:  +#.*)?$", path.read_text(), flags=re.MULTILINE)
        for line in lines:
            require_command(line)


def require_command(line: str) -> None:
    import typer

    command: Any = typer.main.get_command(app)
    words = shlex.split(line)
    assert words.pop(0) == "evomerge"
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(SCRIPT)], check=True)


SRUN = """#!/bin/bash
# Runs the command of a step here, once; tells of it.
while [[ $1 == --* ]]; do shift; done
echo "$*" >> "$STEPS"
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$STEPS"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the script as Slurm would on the only node of a job; steps are run here."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    (binaries / "activate").touch()
    here = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{here}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "EVOMERGE_VENV": str(tmp_path / "venv"),
        "STEPS": str(tmp_path / "steps"),
        "SLURM_JOB_ID": str(free_ports(1)[0]),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURMD_NODENAME": "here",
        "SLURM_CPUS_ON_NODE": "2",
    }
    started = []

    def start(*words: object) -> subprocess.Popen[str]:
        with (tmp_path / "log").open("w") as log:
            command = ["bash", str(SCRIPT), *map(str, words)]
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
def test_the_script_drains_goes_back_into_the_queue_and_goes_on(
    slurm: Callable[..., subprocess.Popen[str]], campaign_file: Callable[..., Path], tmp_path: Path
) -> None:
    campaign, run = campaign_file(search=[{"proposer": "sobol"}], budget={"evaluations": 400}), tmp_path / "run"
    script = slurm(campaign, run)
    deadline = time.monotonic() + 240
    while num_finished(run) < 3:
        assert script.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.3)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(120) != 0
    steps = (tmp_path / "steps").read_text().splitlines()
    assert steps[-1] == f"scontrol requeue {re.search(r'/tmp/ray-(.*)', steps[-2])[1]}"
    before = len(open_run(run).trials)
    assert num_finished(run) == before < 400
    assert "stopped; the same command goes on where this one ended" in (tmp_path / "log").read_text()

    campaign.write_text(campaign.read_text().replace("evaluations: 400", f"evaluations: {before + 2}"))
    script = slurm(campaign, run)
    assert script.wait(240) == 0, (tmp_path / "log").read_text()
    assert open_run(run).is_finished
    assert (tmp_path / "steps").read_text().count("scontrol") == 1


def num_finished(run: Path) -> int:
    return sum(trial.order is not None for trial in open_run(run).trials) if Ledger.exists(locate(run)) else 0
