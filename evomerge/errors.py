"""The one error tree.

    EvoMergeError            anything evomerge raises on purpose; exit status 1: the failure is ours
    ├── InputError           a mistake in what the user gave; exit status 2
    │   ├── CampaignError    the campaign or recipe file
    │   ├── CheckpointError  a base or expert: missing, extra, mismatched or non-finite tensors
    │   ├── DataError        evaluation data
    │   └── RunError         a run that cannot be opened, resumed or picked from
    └── CandidateError       one candidate failed; it becomes a failed trial and the campaign goes on

Every message is one line: what, expected, found, what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal

Kind = Literal[
    "undefined merge",  # these coefficients have none
    "merge error",  # raised while it was computed
    "not finite",  # a NaN or an infinity: in the merged tensors, in what items score, in a descent's loss
    "evaluator error",  # raised while it was scored
    "out of memory",  # in batches of half the size too
    "timed out",
    "killed workers",  # as many as it may
]


class EvoMergeError(Exception):
    """Base of every error that evomerge raises on purpose."""

    exit_status = 1


class InputError(EvoMergeError):
    """A mistake in what the user gave: a file, an option, a checkpoint, data."""

    exit_status = 2


class CampaignError(InputError):
    """A campaign or recipe file says something that cannot be done."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit the base."""


class DataError(InputError):
    """Evaluation data cannot be read or does not hold what a campaign asks for."""


class RunError(InputError):
    """A run cannot be opened or resumed, or holds no such trial."""


class CandidateError(EvoMergeError):
    """One candidate could not be scored; the reason is recorded in its trial.

    kind: a few words for it, by which failures are counted. halved: it was scored in batches of half the size.
    """

    def __init__(self, message: str, kind: Kind = "undefined merge", *, halved: bool = False) -> None:
        super().__init__(message)
        self.kind, self.halved = kind, halved


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, else the list of what is known."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def in_one_line(error: BaseException) -> str:
    """Return the words of a library's error in one line of 300 characters at most; some fill a screen."""
    return " ".join(str(error).split())[:300] or type(error).__name__
