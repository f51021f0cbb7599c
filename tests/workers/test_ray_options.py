"""What the options of the Ray pool ask of a cluster: GPUs (of one that only says it has two), and a user's code."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pool_contract import Echo
from ray_head import Head
from test_ray_pool import point, wait_for

from evomerge.errors import CampaignError
from evomerge.records import Measurement, Split, TaskItems
from evomerge.strict import parse
from evomerge.workers.ray_cluster import RayOptions, places
from evomerge.workers.ray_pool import RayPool


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"),
    [
        (1, 0, 8),
        (0.1, 0, 80),  # 8 // 0.1 is 79
        (3, 0, 2),
        (1, 1, 2),
        (1, 2, 1),
        (1, 3, 0),
        (1, 0.5, 4),
        (1, 0.4, 4),  # 5 would fit into 2, but not 2.5 into 1
        (0.1, 0.1, 20),
        (1, 0.3, 6),
        (4, 0.25, 2),
    ],
)
def test_a_machine_of_8_cpus_and_2_gpus_has_room_for(cpus: float, gpus: float, expected: int) -> None:
    assert places({"CPU": 8.0, "GPU": 2.0}, cpus, gpus) == expected


def test_a_machine_without_gpus_has_room_for_none_that_needs_one() -> None:
    assert places({"CPU": 8.0}, 1, 0.1) == 0


@pytest.mark.parametrize("gpus", [-1.0, 1.5])
def test_gpus_that_no_machine_can_give(gpus: float) -> None:
    with pytest.raises(CampaignError, match="gpus: expected a fraction of one GPU, or a whole number of them"):
        parse(RayOptions, {"kind": "ray", "gpus": gpus}, "workers")


class Seat(Echo):
    """Says by its measurement which GPUs its process sees, as a sum of 1 for the first and 10 for the second."""

    def score(self, subject: Any, split: Split, items: TaskItems | None = None) -> Measurement:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        seconds = {"pid": float(os.getpid()), "gpus": float(sum(10 ** int(number) for number in seen if number))}
        return Measurement(split=split, scores={}, cost=1.0, seconds=seconds)


def seat(_findings: Any, _buffers: Any) -> Seat:
    return Seat()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"),
    [(0.25, 0.5, [1, 1, 10, 10]), (1.0, "auto", [1, 10]), (1.0, 2.0, [11])],
)
def test_as_many_workers_as_there_is_room_for_each_with_its_gpus(
    ray_head: Head, cpus: float, gpus: Any, expected: list[int]
) -> None:
    with RayPool(seat, RayOptions(kind="ray", address=ray_head.cluster, cpus=cpus, gpus=gpus)) as pool:
        wait_for(pool, lambda: pool.num_workers == len(expected))
        assert len(pool._slots) == len(expected)  # none waits for room that there is not
        seen: dict[float, float] = {}
        while len(seen) < len(expected):
            for key in range(2 * len(expected)):
                pool.submit(key, point(1.0), "search")
            seen |= {result.outcome.seconds["pid"]: result.outcome.seconds["gpus"] for result in pool.results()}
        assert sorted(seen.values()) == expected


class Brought(Echo):
    """Says whether the user's module came from a package that Ray has unpacked."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def score(self, subject: Any, split: Split, items: TaskItems | None = None) -> Measurement:
        return Measurement(split=split, scores={}, cost=float("_ray_pkg_" in self.module.__file__), seconds={})


def bring(_findings: Any, _buffers: Sequence[Any]) -> Brought:
    import only_brought  # type: ignore[import-not-found]

    return Brought(only_brought)


@pytest.mark.ray
@pytest.mark.parametrize("key", ["working_dir", "py_modules"])
def test_workers_find_code_that_runtime_env_brings(ray_head: Head, tmp_path: Path, key: str) -> None:
    package = tmp_path / "code" / "only_brought"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    given = {"working_dir": "code", "py_modules": ["code/only_brought"]}[key]
    options = RayOptions(kind="ray", address=ray_head.cluster, count=1, gpus=0.0, runtime_env={key: given})
    with RayPool(bring, options.located(tmp_path)) as pool:
        pool.submit(0, point(1.0), "search")
        [result] = pool.results()
    assert isinstance(result.outcome, Measurement)
    assert result.outcome.cost == 1.0
    assert find_spec("only_brought") is None  # here it is not to be found
