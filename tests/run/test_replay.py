"""Replays of real campaigns on a small real family: what was proposed is proposed again, and what was changed is found."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from silent_watcher import Interrupt, Interrupting, Silent
from typer.testing import CliRunner

from evomerge.campaign.campaign import Campaign
from evomerge.cli import app
from evomerge.errors import RunError
from evomerge.ledger.location import FILE_NAME
from evomerge.report.replay import replayed
from evomerge.report.tables import show
from evomerge.run.replay import replay
from evomerge.run.run import Run, open_run
from evomerge.run.search import search
from evomerge.workers.inline import InlinePool
from evomerge.workers.pool import Result

CHAIN = [
    {"proposer": "gradient_front", "evaluations": 4, "steps": 2},
    {"proposer": "surrogate", "evaluations": 9, "num_startup": 6, "space": {"exceptions": {"*/after": "best"}}},
    {"proposer": "nsga2", "evaluations": 10, "population": 4},
    {"proposer": "cma_es", "evaluations": 9, "population": 4},
]


class InAnyOrder(InlinePool):
    """Several slots, whose results come in any order."""

    num_slots = 3
    rng = np.random.default_rng(0)

    @property
    def num_free(self) -> int:
        return max(self.num_slots - len(self._queue), 0)

    def results(self) -> Iterator[Result]:
        while self._queue:
            self._queue.rotate(int(self.rng.integers(len(self._queue))))
            yield next(super().results())


def found(run: Run) -> list[tuple[str, int, Any]]:
    return [(stage.proposer, stage.num_proposals, stage.difference) for stage in replay(run)]


@pytest.fixture
def interrupted(make_campaign: Callable[..., Campaign], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Three workers, then two, of a campaign that races and starts where the experts say."""
    start = {"low": 0.0, "high": 1.0, "start": {"by": "mean_square"}}
    campaign = make_campaign(
        search=CHAIN,
        budget={"evaluations": sum(stage["evaluations"] for stage in CHAIN)},
        space={"coefficient": start},
        fidelity={},
    )
    monkeypatch.setattr("evomerge.scorer.pools.InlinePool", InAnyOrder)
    for num_slots, after in ((3, 9), (2, 13)):
        monkeypatch.setattr(InAnyOrder, "num_slots", num_slots)
        with pytest.raises(Interrupt):
            search(campaign, tmp_path / "run", watcher=Interrupting(after))
        assert all(difference is None for *_, difference in found(open_run(tmp_path / "run"))), "with trials pending"
    return search(campaign, tmp_path / "run", watcher=Silent())


def test_results_in_any_order_and_interruptions_replay_to_the_last_digit(interrupted: Run) -> None:
    orders = [trial.order for trial in interrupted.trials]
    assert orders != sorted(orders)  # type: ignore[type-var]
    assert interrupted.stopped
    assert found(interrupted) == [(stage["proposer"], stage["evaluations"], None) for stage in CHAIN]


@pytest.fixture(scope="module")
def short(small_digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from evomerge.campaign.campaign import _stages, read_campaign
    from evomerge.campaign.sections import BudgetSection, StageSection

    stages = [{"proposer": "sobol", "evaluations": 4}, {"proposer": "cma_es", "population": 4}]
    update = {
        "search": [StageSection.model_validate(stage) for stage in _stages(stages)],
        "budget": BudgetSection(evaluations=14),
    }
    return search(read_campaign(small_digits.campaign).model_copy(update=update), tmp_path_factory.mktemp("s") / "run")


@pytest.fixture
def tamper(short: Run, tmp_path: Path) -> Callable[[str], Run]:
    """Change a copy of the run's ledger by one statement."""

    def change(statement: str) -> Run:
        shutil.copytree(str(short.location), tmp_path / "copy")
        ledger = sqlite3.connect(tmp_path / "copy" / FILE_NAME)
        with ledger:
            assert ledger.execute(statement).rowcount > 0
        ledger.close()
        return open_run(tmp_path / "copy")

    return change


def test_a_changed_candidate_is_found_by_its_trial_and_coordinate(tamper: Callable[[str], Run], short: Run) -> None:
    recorded = json.loads(json.dumps(short.trials[6].candidate.point))
    moved = [*recorded[:2], recorded[2] + 0.25, *recorded[3:]]
    candidate = json.dumps({"point": moved, "descent": None, "memo": {}})
    run = tamper(f"update evomerge_trials set candidate = '{candidate}' where number = 6")
    first, second = replay(run)
    assert first.difference is None
    assert second.difference is not None
    dimension = short.facts["stages"][1]["space"][2]
    assert second.difference.trial == 6
    assert second.difference.what == f"coefficient {dimension['expert']}/{dimension['group']}"
    assert (second.difference.recorded, second.difference.proposed) == (moved[2], recorded[2])
    assert second.difference.gap == pytest.approx(0.25)
    done = CliRunner().invoke(app, ["replay", str(run.location)])
    assert done.exit_code != 0
    printed = " ".join(done.output.split())
    assert f"differs first in trial 6: {second.difference.what}: recorded" in printed
    assert "0.25 apart" in printed
    assert "the proposals are not those of the record" in str(done.exception)


@pytest.mark.parametrize(
    "statement",
    [
        "update evomerge_scores set value = value + 0.5 where subject = 'trial:5'",
        "update evomerge_trials set known = known - 1 where number = 8",
    ],
    ids=["a score", "what was known"],
)
def test_a_changed_result_is_found_by_the_first_trial_that_followed_from_it(
    tamper: Callable[[str], Run], statement: str
) -> None:
    """Trials 4 to 7 are a generation, drawn before any of its results."""
    first, second = replay(tamper(statement))
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.trial == 8


def test_a_result_before_its_proposal_is_refused(tamper: Callable[[str], Run]) -> None:
    with pytest.raises(RunError, match="trial 8: expected its result after its proposal"):
        replay(tamper("update evomerge_trials set known = known + 1 where number = 8"))


def test_the_command_says_so_where_all_is_the_same(short: Run) -> None:
    done = CliRunner().invoke(app, ["replay", str(short.location)])
    assert done.exit_code == 0, done.output
    assert "all 4 the same" in done.output
    assert "all 14 proposals are the same" in done.output


def test_a_run_without_trials_has_nothing_to_propose(
    make_campaign: Callable[..., Campaign], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtOnce(Silent):
        def begin(self, stages: list[object]) -> None:
            raise Interrupt

    with pytest.raises(Interrupt):
        search(make_campaign(), tmp_path / "run", watcher=AtOnce())
    run = open_run(tmp_path / "run")
    assert replay(run) == []
    show(replayed(run, []))
    assert "nothing to propose again" in capsys.readouterr().out


def test_a_record_that_lacks_what_workers_found_is_refused(tamper: Callable[[str], Run]) -> None:
    run = tamper("update evomerge_runs set facts = json_remove(facts, '$.losses')")
    with pytest.raises(RunError, match="begun by an earlier evomerge"):
        replay(run)


@pytest.mark.ray
def test_a_run_on_two_workers_replays(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    stages = [{"proposer": "sobol", "evaluations": 8}, {"proposer": "surrogate", "num_startup": 4}]
    campaign = make_campaign(search=stages, budget={"evaluations": 24}, workers={"kind": "ray", "count": 2})
    try:
        assert found(search(campaign, tmp_path / "run")) == [("sobol", 8, None), ("surrogate", 16, None)]
    finally:
        ray.shutdown()
