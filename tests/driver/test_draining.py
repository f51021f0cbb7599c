"""The first signal lets things finish, the second stops at once; and the handlers of before come back."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from silent_watcher import Silent

from evomerge.campaign.campaign import Campaign
from evomerge.driver.draining import Draining
from evomerge.records import Trial
from evomerge.run.run import open_run
from evomerge.run.search import search


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: int) -> None:
    notes: list[str] = []
    before = signal.getsignal(number)
    with Draining(notes.append) as draining:
        assert not draining
        os.kill(os.getpid(), number)
        assert draining
        assert "Ctrl-C again" in notes[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_thread_takes_no_signals() -> None:
    asked: list[bool] = []

    def enter() -> None:
        with Draining(lambda _: None) as draining:
            asked.append(bool(draining))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False]


class Signalling(Silent):
    """Asks to stop after so many search trials."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, trial: Trial | None) -> None:
        super().advance(trial)
        if trial is not None and trial.number + 1 == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_search_that_is_asked_to_stop_leaves_nothing_half_done(
    make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    campaign = make_campaign(search=[{"proposer": "sobol"}], budget={"evaluations": 6})
    with pytest.raises(KeyboardInterrupt):
        search(campaign, tmp_path / "run", watcher=Signalling(3))
    assert [trial.order for trial in open_run(tmp_path / "run").trials] == [0, 1, 2]
    run = search(campaign, tmp_path / "run")
    assert run.is_finished
    assert len(run.trials) == 6
