"""A replay in the terminal: whether each stage's proposals are the same again."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from evomerge.report.tables import Shown
from evomerge.run.replay import Difference, StageReplay
from evomerge.run.run import Run


def replayed(run: Run, replays: Sequence[StageReplay]) -> Shown:
    """Return each stage with its first difference, if there is one."""
    table = Table(title=f"{run.location}: proposed again", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stage", "proposer", "proposals", "again"):
        table.add_column(column, justify="right" if column == "proposals" else "left", overflow="fold")
    for stage in replays:
        again = _described(stage.difference) if stage.difference else f"all {stage.num_proposals} the same"
        table.add_row(str(stage.stage + 1), stage.proposer, str(stage.num_proposals), again)
    num_proposals, is_same = sum(stage.num_proposals for stage in replays), not any(of.difference for of in replays)
    people: list[RenderableType] = [table]
    if not replays:
        people = [f"{run.location} holds no trials yet: there is nothing to propose again"]
    elif is_same:
        people.append(f"replayed all {num_proposals} proposals are the same, to the last digit")
    return Shown(
        facts={"run": run.location, "num_proposals": num_proposals, "is_same": is_same},
        tables={"stages": [asdict(stage) for stage in replays]},
        people=people,
    )


def _described(difference: Difference) -> str:
    apart = "" if difference.gap is None else f", {difference.gap:.2g} apart"
    recorded, proposed = (_shown(value) for value in (difference.recorded, difference.proposed))
    return f"differs first in trial {difference.trial}: {difference.what}: recorded {recorded}, now {proposed}{apart}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
