"""The families, and what the models of one score."""

from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from evomerge.families.family import FAMILIES, FamilySummary
from evomerge.report.console import COMMAND
from evomerge.report.tables import Shown


def families() -> Shown:
    """Return the families that can be made."""
    rows = [{"family": name, "description": family.description} for name, family in FAMILIES.items()]
    return Shown(tables={"families": rows}, people=[f"{row['family']:8} {row['description']}" for row in rows])


def made(family: FamilySummary, out: Path) -> Shown:
    """Return what a family's models score, and what to type next."""
    table = Table(title=f"{family.name}: scores on held-out items ({', '.join(sorted(set(family.metrics.values())))})")
    table.add_column("model")
    for task in family.metrics:
        table.add_column(task, justify="right")
    for model, scores in family.scores.items():
        table.add_row(model, *(f"{scores[task]:.3f}" for task in family.metrics))
    cpu_s, campaign = family.seconds.get("total", sum(family.seconds.values())), out / "campaign.yaml"
    built = "was there already" if family.cached else f"{cpu_s:.0f} CPU-seconds"
    facts = {
        "family": family.name,
        "out": out,
        "campaign": campaign,
        "experts": family.experts,
        "metrics": family.metrics,
        "num_items": family.num_items,
        "num_parameters": family.num_parameters,
        "was_there": family.cached,
        "cpu_s": cpu_s,
        "notes": family.notes,
    }
    people: list[RenderableType] = [
        table,
        f"family   {out}  ({family.num_parameters / 1e6:.2f} M parameters, {built})",
        *(f"note     {note}" for note in family.notes),
        f"next     {COMMAND} check {campaign}",
        f"         {COMMAND} search {campaign}",
    ]
    models = [
        {"model": model, **{f"value/{task}": score for task, score in scores.items()}}
        for model, scores in family.scores.items()
    ]
    return Shown(facts=facts, tables={"models": models}, people=people)
