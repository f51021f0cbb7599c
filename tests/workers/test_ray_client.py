"""The Ray pool over Ray Client: the driver is no part of the cluster, and reaches it by one port."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_contract import PoolContract
from ray_head import Head
from test_ray_pool import Actor, echo, point, wait_for

from evomerge.campaign.campaign import Campaign
from evomerge.records import Measurement, Trial
from evomerge.run.search import search
from evomerge.workers import ray_cluster
from evomerge.workers.inline import InlineOptions
from evomerge.workers.ray_cluster import RayOptions
from evomerge.workers.ray_pool import RayPool

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")


def test_a_search_from_outside_the_cluster(
    ray_head: Head, make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    """Comes first: it connects by itself, and lets go in the end."""
    workers = {"kind": "ray", "address": ray_head.client, "count": 2, "gpus": 0.0}
    campaign = make_campaign(workers=workers, search=[{"proposer": "sobol"}], budget={"evaluations": 6})
    run = search(campaign, tmp_path / "ray")
    assert run.is_finished
    assert len(run.trials) == 6
    assert not ray.is_initialized()
    alone = search(campaign.model_copy(update={"workers": InlineOptions()}), tmp_path / "inline")
    assert [values(trial) for trial in run.trials] == [values(trial) for trial in alone.trials]


def test_a_head_that_refuses_once_is_asked_again(ray_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head refuses by chance, in its first seconds alone; so the refusal is made up, and the second try is real."""
    refusals = [ConnectionAbortedError("Starting Ray client server failed")]
    connect = ray.init

    def refusing(*words: Any, **options: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return connect(*words, **options)

    monkeypatch.setattr(ray, "init", refusing)
    monkeypatch.setattr(ray_cluster, "AGAIN_S", 0.0)
    with RayPool(echo, RayOptions(kind="ray", address=ray_head.client, count=1)) as pool:
        pool.submit(0, point(0.5), "search")
        assert [result.key for result in pool.results()] == [0]
    assert not refusals
    assert not ray.is_initialized()


def values(trial: Trial) -> dict[str, float]:
    assert trial.measurement is not None
    return {name: score.value for name, score in trial.measurement.scores.items()}


@pytest.fixture(scope="module")
def connected(ray_head: Head) -> Iterator[None]:
    ray.init(ray_head.client)
    yield
    ray.shutdown()


class TestRayPoolByClient(PoolContract):
    @pytest.fixture(autouse=True)
    def pool(self, connected: None) -> Iterator[None]:
        with RayPool(echo, RayOptions(kind="ray", count=2)) as self._pool:
            yield

    def make(self) -> RayPool:
        return self._pool


@pytest.fixture
def pool(connected: None, tmp_path: Path) -> Iterator[RayPool]:
    notes: list[str] = []

    def scorer(findings: Any, buffers: Any) -> Actor:
        return Actor(tmp_path, buffers)

    with RayPool(scorer, RayOptions(kind="ray", count=2, attempts=2, timeout_s=5), notes.append) as pool:
        yield pool


def test_what_dies_or_takes_too_long_is_noticed(pool: RayPool) -> None:
    for key, number in enumerate((Actor.DIE_ONCE, Actor.DIE, Actor.SLEEP, 1.0)):
        pool.submit(key, point(number), "search")
    results = {result.key: result for result in pool.results()}
    assert sorted(results) == [0, 1, 2, 3]
    assert isinstance(results[0].outcome, Measurement)
    assert results[0].fate["attempts"] == 2
    assert [results[key].fate.get("kind") for key in (1, 2, 3)] == ["killed workers", "timed out", None]


def test_workers_share_what_the_first_has_lent(pool: RayPool) -> None:
    wait_for(pool, lambda: pool.num_workers == 2)
    for key in range(6):
        pool.submit(key, point(Actor.WHO), "search")
    measurements = [result.outcome for result in pool.results()]
    assert len({measurement.seconds["pid"] for measurement in measurements} - {float(os.getpid())}) == 2
    assert {measurement.cost for measurement in measurements} == {float(np.arange(1, 11).sum())}
    assert {(m.seconds["own"], m.seconds["writeable"]) for m in measurements} == {(0.0, 0.0)}
