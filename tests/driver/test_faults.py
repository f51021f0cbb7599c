"""Faults in the midst of a real campaign: what they do to a trial's fate, and that the campaign goes on."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from silent_watcher import Silent
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from evomerge.campaign.campaign import Campaign
from evomerge.errors import CheckpointError, EvoMergeError, InputError
from evomerge.families.family import FamilySummary
from evomerge.ledger import database
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import load_model
from evomerge.records import Trial
from evomerge.report.front import print_finished
from evomerge.run.run import Run, open_run
from evomerge.run.search import search

BATCH = 32


class Memory:
    """Room for so many images a forward; more raise what a GPU's allocator raises."""

    def __init__(self) -> None:
        self.room = 10**6

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and len(inputs[0]) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {len(inputs[0])} images")


def told(trial: Trial) -> dict[str, Any]:
    """What a trial's fate says of failures and memory."""
    return {key: trial.fate[key] for key in ("kind", "halved") if key in trial.fate}


@pytest.fixture
def memory() -> Iterator[Memory]:
    held = Memory()
    hook = register_module_forward_pre_hook(held)
    yield held
    hook.remove()


class Shrinking(Silent):
    """Leaves other room after some search trials."""

    def __init__(self, memory: Memory, room_after: dict[int, int]) -> None:
        super().__init__()
        self.memory, self.room_after = memory, room_after

    def advance(self, trial: Any) -> None:
        super().advance(trial)
        if trial is not None:
            self.memory.room = self.room_after.get(trial.number, self.memory.room)


@pytest.fixture
def campaign(make_campaign: Callable[..., Campaign], small_digits: FamilySummary) -> Callable[..., Campaign]:
    def make(**changes: Any) -> Campaign:
        evaluation = {"kind": "classification", "data": str(small_digits.path / "data"), "batch_size": BATCH}
        return make_campaign(**{"evaluation": evaluation, "search": [{"proposer": "sobol"}], **changes})

    return make


def items_of(run: Run) -> list[dict[str, list[float]]]:
    return [
        {name: score.items.tolist() for name, score in trial.measurement.scores.items()}
        for trial in run.trials
        if trial.measurement
    ]


def test_what_does_not_fit_memory_is_scored_in_half_batches_or_fails(
    campaign: Callable[..., Campaign], memory: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each candidate begins with whole batches: the last one's is not halved."""
    budget = {"evaluations": 4}
    watcher = Shrinking(memory, {0: BATCH // 2, 1: BATCH // 2 - 1, 2: 10**6})
    run = search(campaign(budget=budget), tmp_path / "run", watcher=watcher)
    assert [told(trial) for trial in run.trials] == [
        {},
        {"halved": True},
        {"kind": "out of memory", "halved": True},
        {},
    ]
    assert run.trials[2].failure == (
        "OutOfMemoryError: CUDA out of memory. 16 images; nor did it fit in batches of half the size"
    )
    assert run.failure_kinds == {"out of memory": 1}
    whole = items_of(search(campaign(budget=budget), tmp_path / "whole"))
    assert items_of(run) == [whole[0], whole[1], whole[3]]
    print_finished(run, Path("campaign.yaml"), was_finished=False)
    printed = capsys.readouterr().out
    assert "1 of 4 trials failed (1 out of memory)" in printed
    assert "2 of 4 trials had to be tried again in batches of half the size" in printed


def test_a_descent_that_does_not_fit_memory_goes_on_in_halves_and_arrives_at_the_same_place(
    campaign: Callable[..., Campaign], memory: Memory, tmp_path: Path
) -> None:
    stages = [{"proposer": "adamerging", "loss": "ce", "steps": 4, "batch_size": 2 * BATCH}]
    changes = {"search": stages, "budget": {"evaluations": 2}}
    whole = search(campaign(**changes), tmp_path / "whole")
    run = search(campaign(**changes), tmp_path / "run", watcher=Shrinking(memory, {0: BATCH}))
    assert [told(trial) for trial in run.trials] == [{}, {"halved": True}]
    assert run.trials[0].point == whole.trials[0].point
    np.testing.assert_allclose(run.trials[1].point, whole.trials[1].point, rtol=1e-4)
    assert run.trials[1].measurement.cost == whole.trials[1].measurement.cost


def test_a_base_that_does_not_fit_memory_ends_the_run_with_its_reason(
    campaign: Callable[..., Campaign], memory: Memory, tmp_path: Path
) -> None:
    memory.room = 2  # the rehearsal's items
    with pytest.raises(
        EvoMergeError, match="base cannot be scored on the search items: .*out of memory.*half the size"
    ):
        search(campaign(), tmp_path / "run")


class Filling(Silent):
    """Fills the disk up after some search trials; does something when the search waits for room."""

    def __init__(self, disk: Path, after: int, when_waiting: Callable[["Filling"], object]) -> None:
        super().__init__()
        self.filler, self.after, self.when_waiting = disk / "filler", after, when_waiting

    def advance(self, trial: Any) -> None:
        super().advance(trial)
        if trial is not None and trial.number == self.after:
            with self.filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

    def note(self, line: str) -> None:
        super().note(line)
        if "the search waits" in line:
            self.when_waiting(self)

    def make_room(self) -> None:
        self.filler.unlink()

    def press_ctrl_c_twice(self) -> None:
        """There is room again when the lease is given back; a process that ends without that is known to be dead."""
        self.make_room()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_disk_that_fills_up_is_waited_for_and_nothing_is_lost(
    campaign: Callable[..., Campaign], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C stops a search that waits; the same command goes on, waits again, and goes on when there is room."""
    monkeypatch.setattr(database, "RETRY_S", 0.02)
    budget = {"evaluations": 8}
    with pytest.raises(KeyboardInterrupt):
        search(campaign(budget=budget), small_disk / "run", watcher=Filling(small_disk, 2, Filling.press_ctrl_c_twice))
    assert max(trial.order or 0 for trial in open_run(small_disk / "run").trials) == 2
    watcher = Filling(small_disk, 5, Filling.make_room)
    run = search(campaign(budget=budget), small_disk / "run", watcher=watcher)
    waiting, going_on = (line for line in watcher.notes if str(small_disk) in line and "used again" in line)
    assert re.search(
        r"run cannot be written \(database or disk is full; expected 10 MB of room, found 0\.\d MB\); "
        r"the search waits with its results in memory",
        waiting,
    )
    assert going_on.endswith("can be used again; the search goes on")
    assert [(trial.number, trial.order) for trial in run.trials] == [(number, number) for number in range(8)]
    assert items_of(run) == items_of(search(campaign(budget=budget), tmp_path / "whole"))
    assert run.is_finished


DAMAGES = [  # a file, where it is cut off (None: it is gone), what is told
    ("rot90/model.safetensors", None, "rot90: expected model.safetensors or model.safetensors.index.json"),
    ("rot90/model.safetensors", -100, "rot90: .* the file is cut short"),
    ("rot90/config.json", 10, "rot90: .*config.json cannot be read"),
    ("data/parity.safetensors", None, "task parity: expected the file"),
    ("data/parity.safetensors", 100, "task parity: .* cannot be read"),
]


def test_files_that_vanish_or_break_before_a_search_goes_on(
    campaign: Callable[..., Campaign], small_digits: FamilySummary, tmp_path: Path
) -> None:
    shutil.copytree(small_digits.path / "experts" / "rot90", tmp_path / "rot90")
    shutil.copytree(small_digits.path / "data", tmp_path / "data")
    changes = {
        "experts": {"rot90": str(tmp_path / "rot90")},
        "evaluation": {"kind": "classification", "data": str(tmp_path / "data")},
    }
    search(campaign(**changes, budget={"evaluations": 2}), tmp_path / "run")
    longer = campaign(**changes, budget={"evaluations": 3})
    for path, place, told in DAMAGES:
        content = (tmp_path / path).read_bytes()
        (tmp_path / path).unlink()
        if place is not None:
            (tmp_path / path).write_bytes(content[:place])
        with pytest.raises(InputError, match=told):
            search(longer, tmp_path / "run")
        assert len(open_run(tmp_path / "run").trials) == 2
        (tmp_path / path).write_bytes(content)
    assert len(search(longer, tmp_path / "run").trials) == 3


@pytest.mark.parametrize("place", [None, 200])
def test_tensors_that_vanish_once_their_headers_were_read(
    small_digits: FamilySummary, tmp_path: Path, place: int | None
) -> None:
    shutil.copytree(small_digits.path / "base", tmp_path / "base")
    checkpoint = open_checkpoint("base", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if place is not None:
        path.write_bytes(content[:place])
    with pytest.raises(CheckpointError, match="base: .*base can no longer be read .*; put its files back"):
        load_model(checkpoint, "float32")
