"""What a campaign will do, before anything expensive."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from evomerge.campaign.sections import SpaceChanges
from evomerge.campaign.stages import Stage
from evomerge.check import CheckReport
from evomerge.materialize.guard import GuardReport
from evomerge.materialize.inputs import decisions
from evomerge.report.console import COMMAND, duration, some
from evomerge.report.progress import chain
from evomerge.report.tables import Row, Shown
from evomerge.space.choice import COEFFICIENT, Choice
from evomerge.space.space import Dimension
from evomerge.splits import SPLITS


def checked(file: Path, report: CheckReport) -> Shown:
    """Return what a campaign merges, searches, scores and costs."""
    plan, guard = report.plan, report.guard
    decided = decisions(plan.experts.values(), plan.dtype)
    facts = {
        "campaign": report.campaign.name,
        "experts": list(plan.experts),
        "operators": list(plan.operators),
        "dtype": plan.dtype,
        "num_parameters": plan.num_parameters,
        "num_tensors": len(plan.tensors),
        "num_groups": len(plan.groups),
        "num_dimensions": len(plan.space),
        "size_bytes": plan.size_bytes,
        "residence": report.residence,
        "devices": {str(room.device): room.num_bytes for room in report.devices},
        "kernels": report.kernels,
        "least_merge_s": report.merge_s,
        "evaluation_s": report.evaluation_s,
        "halved": report.evaluation.halved,
        "equivalents": report.equivalents,
        "reference_evaluations": report.reference_evaluations,
        "total_s": report.total_s,
        "decisions": decided,
    }
    people: list[RenderableType] = [
        _summary(file, report),
        _items(report),
        _lengths(guard),
        *([_cosines(guard)] if len(guard.experts) > 1 else []),
        *(f"decided  {decision}" for decision in decided),
        *(f"warning  expert {found.expert}: {found.sign}; {found.advice}" for found in guard.suspicions),
        f"next     {COMMAND} search {file}",
    ]
    tables: dict[str, Sequence[Row]] = {
        "stages": [_stage_row(stage) for stage in report.stages],
        "objectives": _objective_rows(report),
        "task_vectors": _vector_rows(guard),
        "suspicions": [asdict(found) for found in guard.suspicions],
    }
    return Shown(facts=facts, tables=tables, people=people)


def _stage_row(stage: Stage) -> Row:
    return {
        "proposer": stage.proposer,
        "evaluations": stage.num_evaluations,
        "dimensions": stage.num_dimensions,
        "reason": stage.reason,
    }


def _objective_rows(report: CheckReport) -> list[dict[str, Any]]:
    """Return the objectives, each with its counts of items; a summary has no task and no items of its own."""
    splits = report.plan.splits
    return [
        {
            "objective": objective.name,
            "task": objective.task or None,
            "metric": objective.measure,
            "direction": objective.direction,
            **{split: None if objective.summary else len(splits[objective.task][split]) for split in SPLITS},
        }
        for objective in report.plan.objectives
    ]


def _vector_rows(guard: GuardReport) -> list[Row]:
    """Return each expert's task vector: its length over that of the base's tensors by kind, its cosines with others."""
    return [
        {
            "expert": expert,
            "length": dict(zip(guard.kinds, guard.norms_KN[k].tolist(), strict=True)),
            "cosine": dict(zip(guard.experts, guard.cosines_KK[k].tolist(), strict=True)),
        }
        for k, expert in enumerate(guard.experts)
    ]


def _summary(file: Path, report: CheckReport) -> Table:
    plan = report.plan
    table = Table(title=f"{file}: ready to run", show_header=False)
    operators = " or ".join(plan.operators)
    table.add_row("merge", f"{len(plan.experts)} experts ({', '.join(plan.experts)}) by {operators}")
    table.add_row(
        "model",
        f"{plan.num_parameters / 1e6:,.2f} M parameters in {len(plan.tensors)} tensors, {plan.dtype}",
    )
    if any(stage.changes == SpaceChanges() for stage in report.stages):
        dimensions = some([dimension.name for dimension in plan.space.dimensions])
        table.add_row("space", f"{len(plan.space)} dimensions over {len(plan.groups)} groups ({dimensions})")
        if starts := _starts(plan.space.dimensions):
            table.add_row("start", starts)
    table.add_row("search", chain(report.stages))
    parts = (
        "base, experts, the merged model and room for paths"
        if plan.place.keeps_merge
        else "base, experts and the merged model"
    )
    table.add_row("memory", f"{plan.size_bytes / 1e6:,.1f} MB for {parts}; activations come on top")
    table.add_row("merging", f"{_residence(report)}; {report.kernels}")
    if isinstance(plan.space, Choice):
        table.add_row(
            "a merge",
            f"{duration(report.evaluation.seconds['materialize'])} (timed, a weighted sum); moving its "
            f"{plan.size_bytes / 1e6:,.1f} MB takes {duration(report.merge_s)} at {_speed(report)} (measured)",
        )
    halved = ", in batches of half the size: whole ones do not fit memory" if report.evaluation.halved else ""
    table.add_row("one evaluation", f"{duration(report.evaluation_s)} (timed{halved})")
    bound = "at most" if plan.fidelity else "about"
    table.add_row(
        "whole run",
        f"{bound} {duration(report.total_s)} for {report.equivalents:.0f} equivalents and "
        f"{report.reference_evaluations} reference models; the front's test scores come on top",
    )
    return table


def _items(report: CheckReport) -> Table:
    table = Table(title="items", show_edge=True)
    for column in ("objective", "task", "metric", *SPLITS):
        table.add_column(column, justify="right" if column in SPLITS else "left")
    for row in _objective_rows(report):
        counts = ["" if row[split] is None else str(row[split]) for split in SPLITS]
        table.add_row(row["objective"], row["task"] or "", f"{row['metric']} ({row['direction']})", *counts)
    return table


def _lengths(guard: GuardReport) -> Table:
    """How far each expert lies from the base, by kind of module."""
    table = Table(title="task vectors: length over that of the base's tensors", show_edge=True)
    for column in ("expert", *guard.kinds):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for expert, norms in zip(guard.experts, guard.norms_KN, strict=True):
        table.add_row(expert, *(f"{norm:.3f}" for norm in norms))
    return table


def _cosines(guard: GuardReport) -> Table:
    """How each expert's task vector lies to those before it."""
    table = Table(title="cosines between task vectors", show_edge=True)
    for column in ("expert", *(str(number) for number in range(1, len(guard.experts)))):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for number, (expert, cosines) in enumerate(zip(guard.experts, guard.cosines_KK, strict=True), start=1):
        table.add_row(f"{number} {expert}", *(f"{cosine:.2f}" for cosine in cosines[: number - 1]))
    return table


def _starts(dimensions: Sequence[Dimension]) -> str:
    """Where the coefficients start, expert by expert: a number, or the least and the largest over its groups."""
    starts: dict[str, list[float]] = {}
    for dimension in dimensions:
        if dimension.parameter == COEFFICIENT:
            starts.setdefault(dimension.expert or COEFFICIENT, []).append(dimension.start)
    ends = {name: (f"{min(numbers):.3g}", f"{max(numbers):.3g}") for name, numbers in starts.items()}
    return ", ".join(f"{name} {low}" + (f" to {high}" if high != low else "") for name, (low, high) in ends.items())


def _speed(report: CheckReport) -> str:
    """How fast memory moves what a merge moves."""
    bandwidth = report.bandwidth
    if report.residence == "host":
        return f"{bandwidth.host / 1e9:.0f} GB/s on the host and {bandwidth.bus / 1e9:.0f} GB/s to the device"
    return f"{bandwidth.device / 1e9:.0f} GB/s"


def _residence(report: CheckReport) -> str:
    """Where base and experts are while candidates are merged."""
    device, num_bytes = str(report.devices[0].device), report.plan.device_bytes[report.residence]
    if report.residence == "host":
        shares = " and ".join(f"{room.num_bytes / 1e6:,.1f} MB on {room.device}" for room in report.devices)
        return f"on the host, base and experts too; of the merged model {shares}"
    held = ", task vectors in 8 bits" if report.residence == "int8" else ""
    return f"resident on {device}{held}" + (f", {num_bytes / 1e9:,.1f} GB" if device != "cpu" else "")
