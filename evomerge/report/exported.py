"""What an export or a merge wrote, whether it scores what the ledger says, and where it was uploaded."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from evomerge.materialize.adapter import WEIGHTS as ADAPTER_WEIGHTS
from evomerge.publish.card import PICTURE
from evomerge.publish.export import Exported, Merged, Verification
from evomerge.records import Trial
from evomerge.report.console import COMMAND
from evomerge.report.tables import Shown
from evomerge.run.run import Run


def exported(run: Run, trial: Trial, out: Path, found: Exported, *, verified: bool) -> Shown:
    """Return what was written where, how to load it, and what to type next."""
    files = sorted(path for path in out.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    size_bytes = sum(path.stat().st_size for path in weights)
    is_adapter = weights[0].name == ADAPTER_WEIGHTS
    what = "adapter" if is_adapter else f"weights in {len(weights)} file{'s' if len(weights) > 1 else ''}"
    others = [path.name for path in files if path.name in ("recipe.yaml", "mergekit.yaml", "README.md", PICTURE)]
    load = "peft.PeftModel.from_pretrained(base, " if is_adapter else f"transformers.{found.loader}.from_pretrained("
    again = f"{COMMAND} export {run.location.quoted} --trial {trial.number} --out {out}"
    people = [
        f"export   {out}  (trial {trial.number} of {run.location})",
        f"wrote    {what}, {size_bytes / 1e6:,.1f} MB; {', '.join(others)}",
        *([f"tokens   {found.origin}"] if found.origin else []),
        *(f"note     {note}" for note in found.notes),
        f'load     {load}"{out}")',
        *([f"smaller  {again}-adapter --as-adapter"] if found.fits_adapter else []),
        *([] if verified else [f"next     {again}-again --verify{' --as-adapter' if is_adapter else ''}"]),
    ]
    facts = {
        "run": run.location,
        "trial": trial.number,
        "out": out,
        "files": [path.name for path in files],
        "size_bytes": size_bytes,
        "weights": found.weights,
        "loader": found.loader,
        "is_adapter": is_adapter,
        "fits_adapter": found.fits_adapter,
        "origin": found.origin,
        "notes": found.notes,
    }
    return Shown(facts=facts, people=people)


def verification(rows: Sequence[Verification]) -> Shown:
    """Return re-scored beside recorded numbers."""
    table = Table(title="the exported model, loaded again and re-scored")
    for column in ("split", "objective", "re-scored", "ledger", "items that changed"):
        table.add_column(column, justify="left" if column in ("split", "objective") else "right")
    for row in rows:
        table.add_row(row.split, row.objective, repr(row.rescored), repr(row.recorded), str(row.num_changed_items))
    is_same = all(row.is_same for row in rows)
    return Shown(
        facts={"verified": is_same},
        tables={"verification": [asdict(row) for row in rows]},
        people=[table, *(["equal to the last digit"] if is_same else [])],
    )


def pushed(address: str) -> Shown:
    """Return where an export was uploaded."""
    return Shown(facts={"pushed": address}, people=[f"pushed   {address}"])


def merged(out: Path, found: Merged) -> Shown:
    """Return what of the recipe should be known, and what was written."""
    people = [
        *(f"decided  {decision}" for decision in found.decisions),
        *([f"tokens   {found.origin}"] if found.origin else []),
        *(f"note     {note}" for note in found.notes),
        f"merged   {out}  (tensors {found.weights[:12]})",
    ]
    return Shown(facts={"out": out, **asdict(found)}, people=people)
