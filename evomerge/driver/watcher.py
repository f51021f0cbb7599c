"""Who looks on while a run is driven."""

from collections.abc import Sequence
from typing import Protocol

from evomerge.campaign.stages import Stage
from evomerge.records import Trial


class Watcher(Protocol):
    """Shows a person how far the run is."""

    def begin(self, stages: Sequence[Stage]) -> None:
        """The run begins, or goes on."""

    def phase(self, title: str, total: int, done: int) -> None:
        """Begin a phase of ``total`` evaluations, of which ``done`` are in the ledger."""

    def issue(self, trial: Trial) -> None:
        """A candidate has been handed to the workers, for the first time or, after an interruption, again."""

    def advance(self, trial: Trial | None) -> None:
        """One evaluation finished; a search trial is handed over."""

    def note(self, line: str) -> None:
        """Something that a person should know: what is being loaded, a worker that died."""


class Unwatched:
    """A watcher that shows nothing."""

    def begin(self, stages: Sequence[Stage]) -> None:
        """Nothing to show."""

    def phase(self, title: str, total: int, done: int) -> None:
        """Nothing to show."""

    def issue(self, trial: Trial) -> None:
        """Nothing to show."""

    def advance(self, trial: Trial | None) -> None:
        """Nothing to show."""

    def note(self, line: str) -> None:
        """Nothing to show."""


class Watchers:
    """Several watchers, told one after the other."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def begin(self, stages: Sequence[Stage]) -> None:
        """The run begins, or goes on."""
        for watcher in self._watchers:
            watcher.begin(stages)

    def phase(self, title: str, total: int, done: int) -> None:
        """Begin a phase of ``total`` evaluations, of which ``done`` are in the ledger."""
        for watcher in self._watchers:
            watcher.phase(title, total, done)

    def issue(self, trial: Trial) -> None:
        """A candidate has been handed to the workers."""
        for watcher in self._watchers:
            watcher.issue(trial)

    def advance(self, trial: Trial | None) -> None:
        """One evaluation finished; a search trial is handed over."""
        for watcher in self._watchers:
            watcher.advance(trial)

    def note(self, line: str) -> None:
        """Something that a person should know."""
        for watcher in self._watchers:
            watcher.note(line)
