"""The Ray pool, on a real Ray cluster of this machine: what every pool must do, and what becomes of dying workers."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_contract import Echo, EchoFindings, PoolContract

from evomerge.errors import CampaignError, CandidateError, CheckpointError, EvoMergeError
from evomerge.records import Candidate, Measurement, Split, TaskItems
from evomerge.workers import ray_pool
from evomerge.workers.ray_cluster import RayOptions
from evomerge.workers.ray_pool import RayPool

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")


class Actor(Echo):
    """Does what its subject's number says; ``folder`` is where it leaves word of its process."""

    SLEEP, DIE, DIE_ONCE, WHO = 10.0, 20.0, 30.0, 40.0

    def __init__(self, folder: Path, lent: Sequence[Any]) -> None:
        super().__init__()
        self.folder, self.lent, self.is_own = folder, lent, not lent
        self.own = np.arange(10)

    def buffers(self) -> Sequence[Any]:
        return [self.own, self.own + 1]

    def adopt(self, buffers: Sequence[Any]) -> None:
        self.lent, self.is_own = buffers, False

    def score(self, subject: Any, split: Split, items: TaskItems | None = None) -> Measurement:
        number = subject.point[0]
        if number == self.SLEEP:
            (self.folder / "asleep").write_text(str(os.getpid()))
            time.sleep(600)
        if number == self.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.DIE_ONCE and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.WHO:
            time.sleep(0.2)  # long enough for the other worker to get one too
            read = self.lent or self.buffers()  # of a single worker, its own
            flags = read[0].flags
            return Measurement(
                split=split,
                scores={},
                cost=float(read[1].sum()),
                seconds={"pid": float(os.getpid()), "own": float(self.is_own), "writeable": float(flags.writeable)},
            )
        return super().score(subject, split, items)


def start_ray() -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        start_ray()
        yield
        ray.shutdown()


def echo(_findings: Any, _buffers: Any) -> Echo:
    return Echo()


def point(number: float) -> Candidate:
    return Candidate(point=(number,))


def wait_for(pool: RayPool, happens: Callable[[], bool]) -> None:
    """Let the pool go on until something happens; no result may come meanwhile."""
    deadline = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < deadline
        pool._step(0.1)
        assert not pool._done


class TestRayPool(PoolContract):
    @pytest.fixture(autouse=True)
    def pool(self) -> Iterator[None]:
        with RayPool(echo, RayOptions(kind="ray", count=2)) as self._pool:
            yield

    def make(self) -> RayPool:
        return self._pool


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def open_pool(tmp_path: Path, notes: list[str]) -> Iterator[Any]:
    opened: list[RayPool] = []

    def make(**options: Any) -> RayPool:
        folder = tmp_path

        def scorer(findings: Any, buffers: Any) -> Actor:
            return Actor(folder, buffers)

        opened.append(RayPool(scorer, RayOptions(kind="ray", **options), notes.append))
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()


def test_what_waits_for_a_worker_waits_while_it_is_busy(open_pool: Any) -> None:
    pool = open_pool(count=1)
    for key in range(2):
        pool.submit(key, point(Actor.WHO), "search")
    first, second = (result.fate for result in pool.results())
    assert first["worker"] == second["worker"]
    assert second["queue_s"] >= 0.2  # the first sleeps so long
    assert first["busy_s"] >= 0.2


def test_a_candidate_whose_worker_dies_goes_to_another(
    open_pool: Any, notes: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    pool = open_pool(count=1)
    pool.submit(7, point(Actor.DIE_ONCE), "search")
    [result] = pool.results()
    assert isinstance(result.outcome, Measurement)
    assert result.fate["attempts"] == 2
    assert len(result.fate["deaths"]) == 1
    assert "died (its process ended); its candidate goes to another" in notes[0]
    assert capfd.readouterr() == ("", "")  # Ray itself would print fifteen lines


def test_what_kills_workers_fails_in_the_end_and_the_others_are_scored(open_pool: Any) -> None:
    pool = open_pool(count=2, attempts=2)
    for key, number in enumerate((1.0, Actor.DIE, 2.0, 3.0)):
        pool.submit(key, point(number), "search")
    results = {result.key: result for result in pool.results()}
    assert sorted(results) == [0, 1, 2, 3]
    killer = results[1]
    assert isinstance(killer.outcome, CandidateError)
    assert (killer.fate["kind"], killer.fate["attempts"]) == ("killed workers", 2)
    assert "its worker died 2 times" in str(killer.outcome)
    assert all(isinstance(results[key].outcome, Measurement) for key in (0, 2, 3))


def test_kill_9_from_outside_loses_nothing(open_pool: Any, tmp_path: Path) -> None:
    pool = open_pool(count=2)
    pool.submit(0, point(Actor.SLEEP), "search")
    pool.submit(1, point(1.0), "search")
    first = next(pool.results())
    assert first.key == 1
    wait_for(pool, (tmp_path / "asleep").exists)
    killed = int((tmp_path / "asleep").read_text())
    (tmp_path / "asleep").unlink()
    os.kill(killed, signal.SIGKILL)
    pool.submit(2, point(2.0), "search")
    assert next(pool.results()).key == 2
    wait_for(pool, (tmp_path / "asleep").exists)  # the other one has it now


def test_what_takes_too_long_fails_and_its_worker_is_replaced(open_pool: Any) -> None:
    pool = open_pool(count=1, timeout_s=1.5)
    pool.submit(0, point(Actor.SLEEP), "search")
    pool.submit(1, point(1.0), "search")
    results = {result.key: result for result in pool.results()}
    assert (results[0].fate["kind"], str(results[0].outcome)) == (
        "timed out",
        "it took longer than timeout_s: 1.5 seconds",
    )
    assert isinstance(results[1].outcome, Measurement)


def test_two_results_of_one_moment_are_both_yielded(open_pool: Any) -> None:
    """The driver takes one result at a time, and asks anew for the next."""
    pool = open_pool(count=2, timeout_s=1.0)
    wait_for(pool, lambda: pool.num_workers == 2)
    for key in range(2):
        pool.submit(key, point(Actor.SLEEP), "search")
    time.sleep(2)  # both are late when the pool looks
    assert {next(pool.results()).key, next(pool.results()).key} == {0, 1}
    assert not list(pool.results())


def test_a_worker_that_reads_other_files_is_left_out(tmp_path: Path, notes: list[str]) -> None:
    class Other(EchoFindings):
        def agrees(self, other: Any) -> bool:
            return False

    def scorer(_findings: Any, _buffers: Any) -> Echo:
        made = Echo()
        if (tmp_path / "first").exists():
            made.findings = Other()
        (tmp_path / "first").touch()
        return made

    with RayPool(scorer, RayOptions(kind="ray", count=2), notes.append) as pool:
        wait_for(pool, lambda: bool(notes))
        for key in range(3):
            pool.submit(key, point(1.0), "search")
        assert len(list(pool.results())) == 3
        assert (pool.num_workers, len(pool._slots)) == (1, 1)
    assert len(notes) == 1
    assert "reads other checkpoints or items, and is left out" in notes[0]


def test_files_that_vanish_are_waited_for(tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that replaces a dead one cannot read them: that is said once, and tried again until they are back."""
    monkeypatch.setattr(ray_pool, "LOOK_S", 0.1)

    def scorer(_findings: Any, lent: Sequence[Any]) -> Actor:
        with (tmp_path / "tries").open("a") as tries:
            tries.write("x")
        if (tmp_path / "gone").exists():
            raise CheckpointError("rot90: no such folder")
        return Actor(tmp_path, lent)

    with RayPool(scorer, RayOptions(kind="ray", count=1), notes.append) as pool:
        (tmp_path / "gone").touch()
        pool.submit(0, point(Actor.DIE_ONCE), "search")
        wait_for(pool, lambda: (tmp_path / "tries").stat().st_size >= 4)
        (tmp_path / "gone").unlink()
        [result] = pool.results()
    assert isinstance(result.outcome, Measurement)
    left_out = "a worker cannot open the campaign, and is left out: rot90: no such folder"
    assert notes.count(left_out) == 1
    assert notes[-1] == "a worker has come; the search goes on"


def test_workers_read_what_the_first_has_lent_and_none_keeps_a_copy(open_pool: Any) -> None:
    pool = open_pool(count=2)
    wait_for(pool, lambda: pool.num_workers == 2)
    for key in range(6):
        pool.submit(key, point(Actor.WHO), "search")
    measurements = [result.outcome for result in pool.results()]
    assert len({measurement.seconds["pid"] for measurement in measurements}) == 2
    assert {measurement.cost for measurement in measurements} == {float(np.arange(1, 11).sum())}
    assert {(m.seconds["own"], m.seconds["writeable"]) for m in measurements} == {(0.0, 0.0)}


def test_a_campaign_that_no_worker_can_open_is_the_users_mistake() -> None:
    def refuse(_findings: Any, _buffers: Any) -> Echo:
        raise CheckpointError("base: no such folder")

    with pytest.raises(CheckpointError, match="base: no such folder"):
        RayPool(refuse, RayOptions(kind="ray", count=1))


def test_workers_that_die_as_they_start_end_the_run() -> None:
    def die(_findings: Any, _buffers: Any) -> Echo:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(EvoMergeError, match="3 workers died as they started"):
        RayPool(die, RayOptions(kind="ray", count=1))


def test_a_cluster_that_is_not_there_is_the_users_mistake() -> None:
    ray.shutdown()
    try:
        with pytest.raises(CampaignError, match=r"workers.address: no Ray cluster at auto"):
            RayPool(echo, RayOptions(kind="ray", count=1, address="auto"))
    finally:
        start_ray()
