"""Watchers of a run (``driver.Watcher``) that show nothing, or hand on to others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.records import Trial

if TYPE_CHECKING:
    from evomerge.driver import Watcher
    from evomerge.stages import Stage


class Unwatched:
    """A watcher that shows nothing."""

    def begin(self, stages: "Sequence[Stage]") -> None:
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

    def __init__(self, watchers: "Sequence[Watcher]") -> None:
        self._watchers = watchers

    def begin(self, stages: "Sequence[Stage]") -> None:
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
