import os
import secrets
import subprocess
import sys
import uuid

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of tests side by side, each has a core
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "token"  # clusters of tests let tests in, and leave no token in the home folder
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from hypothesis import HealthCheck, settings
from postgres_server import NoServerError, served
from ray_head import Head, started
from silent_watcher import Silent
from small_families import SMALL
from typed_command import Typed

from evomerge import cli
from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.families.family import FamilySummary, make

# No test may fail because the machine is busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
torch.set_num_threads(1)  # the models are tiny: a second thread only waits
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its interpreter runs kernels on the CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with whole campaigns: of tests side by side, the longest must not come last."""
    items.sort(key=lambda item: item.path.parent.name not in {"tests", "campaign", "driver", "run", "publish"})


def made_once(name: str) -> FamilySummary:
    """Make a real family in the checkout's cache; of the processes that test side by side, one trains it."""
    folder = Path(__file__).parent.parent / ".cache" / "families"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        return make(name, folder / name)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Typed]:
    """Type a command into this process: what a new one does, without its imports."""

    def type_(*words: object, cwd: Path | None = None) -> Typed:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, words)])
        with monkeypatch.context() as here, pytest.raises(SystemExit) as exited:
            if cwd:
                here.chdir(cwd)
            cli.main()
        printed, errors = capsys.readouterr()
        return Typed(int(exited.value.code or 0), printed, errors)

    return type_


@pytest.fixture
def watcher() -> Silent:
    return Silent()


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> FamilySummary:
    """Three experts of a model of a few thousand parameters: real files, no skill to speak of."""
    return make("digits", tmp_path_factory.mktemp("small") / "digits", recipe=SMALL["digits"])


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> FamilySummary:
    return make("text", tmp_path_factory.mktemp("small") / "text", recipe=SMALL["text"])


@pytest.fixture(scope="session")
def digits4() -> FamilySummary:
    """The real family of four tasks: half a minute to train, once a checkout."""
    return made_once("digits4")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a real server's database; started for the first test that wants it."""
    try:
        with served() as server:
            yield server.url
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Head]:
    """The addresses of a Ray cluster with a job server; no longer than a file's tests: ``auto`` would find it later."""
    with started() as head:
        yield head


@pytest.fixture
def empty_postgresql(postgresql: str) -> str:
    """URL of a database of that server's that holds nothing; its name is new."""
    import psycopg

    name = f"empty_{uuid.uuid4().hex}"
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return postgresql.replace("/postgres?", f"/{name}?")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def campaign_file(tmp_path: Path, small_digits: FamilySummary) -> Callable[..., Path]:
    """Write a campaign of the small family with some keys changed (None removes one); return its path."""

    def write(**changes: Any) -> Path:
        sections = yaml.safe_load(small_digits.campaign.read_text())
        sections["base"] = str(small_digits.path / "base")
        sections["experts"] = {name: str(small_digits.path / "experts" / name) for name in small_digits.experts}
        sections["evaluation"]["data"] = str(small_digits.path / "data")
        sections |= changes
        path = tmp_path / "campaign.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in sections.items() if value is not None}))
        return path

    return write


@pytest.fixture
def make_campaign(campaign_file: Callable[..., Path]) -> Callable[..., Campaign]:
    return lambda **changes: read_campaign(campaign_file(**changes))
