"""A head of a Ray cluster with a job server and a server for Ray Client, as a user starts one with ray start."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_S = 120


@dataclass(frozen=True)
class Head:
    """Addresses of one cluster of 2 CPUs and 2 GPUs, which are none."""

    cluster: str
    client: str
    jobs: str


@contextmanager
def started() -> Iterator[Head]:
    """Start a head in a process of ours, without a virtual environment's PATH; kill what belongs to it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="evomerge-ray-"))  # short: sockets lie in it
    gcs, client, jobs, agent, grpc = free_ports(5)
    options = {
        "port": gcs,
        "ray-client-server-port": client,
        "dashboard-port": jobs,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": grpc,
        "node-ip-address": "127.0.0.1",
        "temp-dir": folder,
        "num-cpus": 2,
        "num-gpus": 2,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "workers"]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"],
        "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not all(map(answers, (gcs, client, jobs))):
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{gcs}", f"ray://127.0.0.1:{client}", f"http://127.0.0.1:{jobs}")
    finally:
        for pid in belonging_to(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def belonging_to(folder: Path) -> list[int]:
    """Return the processes whose command or environment names the cluster's own folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if str(folder).encode() in told and int(path.name) != os.getpid():
                found.append(int(path.name))
    return found
