"""What an export wrote, and whether it scores what the ledger says."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from evomerge.errors import EvoMergeError
from evomerge.materialize.adapter import WEIGHTS as ADAPTER_WEIGHTS
from evomerge.publish.card import PICTURE
from evomerge.publish.export import Exported, Verification
from evomerge.records import Trial
from evomerge.report.console import COMMAND, console, say
from evomerge.run.run import Run


def print_export(run: Run, trial: Trial, out: Path, exported: Exported, *, verified: bool) -> None:
    """Say what was written where, how to load it, and what to type next."""
    files = sorted(path for path in out.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    size_mb = sum(path.stat().st_size for path in weights) / 1e6
    is_adapter = weights[0].name == ADAPTER_WEIGHTS
    what = "adapter" if is_adapter else f"weights in {len(weights)} file{'s' if len(weights) > 1 else ''}"
    others = [path.name for path in files if path.name in ("recipe.yaml", "mergekit.yaml", "README.md", PICTURE)]
    say(f"export   {out}  (trial {trial.number} of {run.location})")
    say(f"wrote    {what}, {size_mb:,.1f} MB; {', '.join(others)}")
    if exported.origin:
        say(f"tokens   {exported.origin}")
    for note in exported.notes:
        say(f"note     {note}")
    load = "peft.PeftModel.from_pretrained(base, " if is_adapter else f"transformers.{exported.loader}.from_pretrained("
    say(f'load     {load}"{out}")')
    again = f"{COMMAND} export {run.location.quoted} --trial {trial.number} --out {out}"
    if exported.fits_adapter:
        say(f"smaller  {again}-adapter --as-adapter")
    if not verified:
        say(f"next     {again}-again --verify{' --as-adapter' if is_adapter else ''}")


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
