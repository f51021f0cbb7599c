"""A campaign on a Ray cluster of two nodes, with everything that can be lost lost on the way.

Sobol's points do not depend on results, so that the same trials must come out, once each, whatever died meanwhile.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from silent_watcher import Silent

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.sections import BudgetSection, DataFlowSection, ObjectiveSection, StageSection
from evomerge.families.family import FamilySummary
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import locate
from evomerge.records import Trial
from evomerge.run.run import Run, open_run
from evomerge.run.search import search

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("ray")

NUM_EVALUATIONS = 24


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def campaign(digits4: FamilySummary) -> Campaign:
    update = {"search": [StageSection(proposer="sobol")], "budget": BudgetSection(evaluations=NUM_EVALUATIONS)}
    return read_campaign(digits4.campaign).model_copy(update=update)


def on(campaign: Campaign, cluster: Any) -> Campaign:
    from evomerge.workers.ray_cluster import RayOptions

    return campaign.model_copy(update={"workers": RayOptions(kind="ray", address=cluster.address)})


def outcomes(run: Run) -> dict[int, tuple[Any, ...]]:
    """Trial -> its point and scores, however it came about."""

    def scores(trial: Trial) -> dict[str, float]:
        assert trial.measurement is not None
        return {name: score.value for name, score in trial.measurement.scores.items()}

    return {trial.number: (trial.point, scores(trial)) for trial in run.trials}


@pytest.fixture(scope="module")
def undisturbed(campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(campaign, tmp_path_factory.mktemp("inline") / "run")


def require_the_same(run: Run, undisturbed: Run) -> None:
    assert outcomes(run) == outcomes(undisturbed)
    assert sorted(trial.order for trial in run.trials if trial.order is not None) == list(range(NUM_EVALUATIONS))
    assert {trial.number for trial in run.front} == {trial.number for trial in undisturbed.front}
    assert run.tested.keys() == undisturbed.tested.keys()


class At(Silent):
    """Does something once, after so many search trials; the search begins when so many workers are there."""

    def __init__(self, after: int, do: Callable[[], object], num_workers: int = 2) -> None:
        super().__init__()
        self.after, self.do, self.num_workers = after, do, num_workers

    def begin(self, stages: list[object]) -> None:
        wait_until(lambda: sum(name == "ray::_Worker" for name in workers().values()) == self.num_workers)

    def advance(self, trial: object) -> None:
        super().advance(trial)
        if trial is not None:
            self.after -= 1
            if self.after == 0:
                self.do()


def workers() -> dict[int, str]:
    """Return the processes of the pool's actors, by the names that Ray gives them: of what they are at, or idle."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found[int(path.parent.name)] = path.read_bytes().rstrip(b"\0").decode()
    return {pid: name for pid, name in found.items() if name.startswith("ray::_Worker")}


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_all_workers() -> None:
    found = workers()
    assert len(found) == 2
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def test_workers_killed_at_work(campaign: Campaign, cluster: Any, undisturbed: Run, tmp_path: Path) -> None:
    watcher = At(5, kill_all_workers)
    require_the_same(search(on(campaign, cluster), tmp_path / "ray", watcher=watcher), undisturbed)
    assert any("died (its process ended)" in note for note in watcher.notes)
    assert any(trial.fate["attempts"] == 2 for trial in open_run(tmp_path / "ray").trials)


def test_a_node_that_is_lost(campaign: Campaign, cluster: Any, undisturbed: Run, tmp_path: Path) -> None:
    other = next(iter(cluster.worker_nodes))
    watcher = At(5, lambda: cluster.remove_node(other, allow_graceful=False))
    require_the_same(search(on(campaign, cluster), tmp_path / "ray", watcher=watcher), undisturbed)


def test_a_node_that_comes_late_gets_work(campaign: Campaign, cluster: Any, undisturbed: Run, tmp_path: Path) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    watcher = At(3, lambda: cluster.add_node(num_cpus=1), num_workers=1)
    require_the_same(search(on(campaign, cluster), tmp_path / "ray", watcher=watcher), undisturbed)


def test_a_driver_killed_and_started_again(campaign: Campaign, cluster: Any, undisturbed: Run, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    (tmp_path / "campaign.json").write_text(on(campaign, cluster).model_dump_json())
    program = (
        "import sys; from pathlib import Path; from evomerge.campaign.campaign import Campaign; from evomerge.run.search import search; "
        "search(Campaign.model_validate_json(Path(sys.argv[1]).read_text(), strict=False), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "campaign.json"), str(folder)]
    for least in (4, 12):
        driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda least=least: num_finished(folder) >= least)
        driver.kill()
        driver.wait()
    subprocess.run(command, check=True, timeout=240)
    require_the_same(open_run(folder), undisturbed)


def num_finished(folder: Path) -> int:
    if not Ledger.exists(locate(folder)):
        return 0
    with closing(Ledger.open(locate(folder))) as ledger:
        return sum(trial.order is not None for trial in ledger.trials())


def test_paths_through_the_best_merge_of_the_stage_before(
    small_text: FamilySummary, cluster: Any, tmp_path: Path
) -> None:
    """Workers that die in the second stage, and those that come for them, have the same merge."""
    stages = [
        StageSection(proposer="sobol", evaluations=6),
        StageSection(proposer="sobol", space=DataFlowSection(kind="data_flow", max_layers=3)),
    ]
    campaign = read_campaign(small_text.campaign)
    evaluation = campaign.evaluation | {"split": {"adapt": 0.0, "search": 0.5, "test": 0.5}}
    update = {
        "objectives": [ObjectiveSection(name=task, task=task, metric="loss") for task in ("python", "sort")],
        "evaluation": evaluation,
        "search": stages,
        "budget": BudgetSection(evaluations=NUM_EVALUATIONS),
    }
    campaign = campaign.model_copy(update=update)
    inline = search(campaign, tmp_path / "inline")
    run = search(on(campaign, cluster), tmp_path / "run", watcher=At(10, kill_all_workers))
    assert run.facts["stages"] == inline.facts["stages"]
    require_the_same(run, inline)
    assert {name: of.weights for name, of in run.tested.items()} == {
        name: of.weights for name, of in inline.tested.items()
    }
