"""The Ray pool over Ray Client: the driver is no part of the cluster, and reaches it by one port."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_contract import PoolContract
from ray_head import Head
from test_ray_pool import Actor, echo, point, wait_for

from evomerge.records import Measurement
from evomerge.workers.ray_pool import RayOptions, RayPool

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def connected(ray_head: Head) -> Iterator[None]:
    ray.init(ray_head.client)
    yield
    ray.shutdown()


class TestRayPoolByClient(PoolContract):
    @pytest.fixture(autouse=True)
    def pool(self) -> Iterator[None]:
        with RayPool(echo, RayOptions(kind="ray", count=2)) as self._pool:
            yield

    def make(self) -> RayPool:
        return self._pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RayPool]:
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
