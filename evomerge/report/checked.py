"""What a campaign will do, before anything expensive."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from evomerge.campaign.plan import decisions
from evomerge.campaign.sections import SpaceChanges
from evomerge.check import CheckReport
from evomerge.materialize.guard import GuardReport
from evomerge.report.console import COMMAND, console, duration, say, some
from evomerge.report.progress import chain
from evomerge.space.choice import COEFFICIENT, Choice
from evomerge.space.space import Dimension
from evomerge.splits import SPLITS


def print_check(file: Path, report: CheckReport) -> None:
    """Print what a campaign merges, searches, scores and costs."""
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
    table.add_row(
        "memory", f"{plan.size_bytes / 1e6:,.1f} MB for base, experts and the merged model; activations come on top"
    )
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
    console.print(table)
    items = Table(title="items", show_edge=True)
    for column in ("objective", "task", "metric", "adapt", "search", "test"):
        items.add_column(column, justify="right" if column in SPLITS else "left")
    for objective in plan.objectives:
        if objective.summary:
            items.add_row(objective.name, "", f"{objective.measure} ({objective.direction})", "", "", "")
            continue
        counts = [str(len(plan.splits[objective.task][split])) for split in SPLITS]
        items.add_row(objective.name, objective.task, f"{objective.metric} ({objective.direction})", *counts)
    console.print(items)
    _print_guard(report.guard)
    for decision in decisions(plan.experts.values(), plan.dtype):
        say(f"decided  {decision}")
    for suspicion in report.guard.suspicions:
        say(f"warning  expert {suspicion.expert}: {suspicion.sign}; {suspicion.advice}")
    say(f"next     {COMMAND} search {file}")


def _print_guard(guard: GuardReport) -> None:
    """Print how far each expert lies from the base, by kind of module, and how its task vector lies to the others'."""
    table = Table(title="task vectors: length over that of the base's tensors", show_edge=True)
    for column in ("expert", *guard.kinds):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for expert, norms in zip(guard.experts, guard.norms_KN, strict=True):
        table.add_row(expert, *(f"{norm:.3f}" for norm in norms))
    console.print(table)
    if len(guard.experts) == 1:
        return
    table = Table(title="cosines between task vectors", show_edge=True)
    for column in ("expert", *(str(number) for number in range(1, len(guard.experts)))):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for number, (expert, cosines) in enumerate(zip(guard.experts, guard.cosines_KK, strict=True), start=1):
        table.add_row(f"{number} {expert}", *(f"{cosine:.2f}" for cosine in cosines[: number - 1]))
    console.print(table)


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
