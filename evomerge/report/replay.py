"""A replay in the terminal: whether each stage's proposals are the same again."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from evomerge.errors import EvoMergeError
from evomerge.report.console import console, make_progress, say
from evomerge.run.replay import Difference, StageReplay
from evomerge.run.replay import replay as run_replay
from evomerge.run.run import Run


def replay(run: Run) -> None:
    """Replay a run behind a progress bar, and print what came of each stage. Raises: EvoMergeError if one differs."""
    with make_progress() as progress:
        bar = progress.add_task("replay", total=None, note="")
        replays = run_replay(run, lambda done, total: progress.update(bar, completed=done, total=total))
    print_replay(run, replays)


def print_replay(run: Run, replays: Sequence[StageReplay]) -> None:
    """Print each stage with its first difference, if there is one. Raises: EvoMergeError if there is."""
    if not replays:
        say(f"{run.location} holds no trials yet: there is nothing to propose again")
        return
    table = Table(title=f"{run.location}: proposed again", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stage", "proposer", "proposals", "again"):
        table.add_column(column, justify="right" if column == "proposals" else "left", overflow="fold")
    for stage in replays:
        again = _described(stage.difference) if stage.difference else f"all {stage.num_proposals} the same"
        table.add_row(str(stage.stage + 1), stage.proposer, str(stage.num_proposals), again)
    console.print(table)
    if any(stage.difference for stage in replays):
        raise EvoMergeError(
            "the proposals are not those of the record: it was changed, or another version or machine proposes "
            "otherwise; replay it with the packages and on the kind of machine of the run"
        )
    say(f"replayed all {sum(stage.num_proposals for stage in replays)} proposals are the same, to the last digit")


def _described(difference: Difference) -> str:
    apart = "" if difference.gap is None else f", {difference.gap:.2g} apart"
    recorded, proposed = (_shown(value) for value in (difference.recorded, difference.proposed))
    return f"differs first in trial {difference.trial}: {difference.what}: recorded {recorded}, now {proposed}{apart}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
