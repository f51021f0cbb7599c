"""What an export wrote, and whether it scores what the ledger says."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from evomerge.errors import EvoMergeError
from evomerge.export import Verification
from evomerge.records import Trial
from evomerge.report.console import COMMAND, console, say
from evomerge.run import Run


def print_export(run: Run, trial: Trial, out: Path, *, verified: bool) -> None:
    """Say what was written where, and how to load it."""
    say(f"export   {out}  (trial {trial.number} of {run.location}; checkpoint, recipe.yaml, README.md)")
    say(f'load     transformers.AutoModel.from_pretrained("{out}")')
    if not verified:
        say(f"next     {COMMAND} export {run.location.quoted} --trial {trial.number} --out {out}-again --verify")


def print_verification(rows: Sequence[Verification]) -> None:
    """Print re-scored against recorded numbers. Raises: EvoMergeError if any differs."""
    table = Table(title="the exported model, loaded again and re-scored")
    for column in ("split", "objective", "re-scored", "ledger", "items that changed"):
        table.add_column(column, justify="left" if column in ("split", "objective") else "right")
    for row in rows:
        table.add_row(row.split, row.objective, repr(row.rescored), repr(row.recorded), str(row.num_changed_items))
    console.print(table)
    if any(row.rescored != row.recorded for row in rows):
        raise EvoMergeError("the exported model does not score what the ledger says; rebuild it where the run was made")
    console.print("equal to the last digit")
