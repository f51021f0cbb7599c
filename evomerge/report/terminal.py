"""What a person sees in the terminal: progress, tables, and what to type next; within 100 columns."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from evomerge.assemble import OPERATORS
from evomerge.campaign import Campaign
from evomerge.card import PICTURE
from evomerge.check import CheckReport
from evomerge.claims import claims
from evomerge.errors import EvoMergeError, RunError
from evomerge.export import Exported, Verification
from evomerge.families.family import make
from evomerge.front.front import front_hypervolume, front_of, maximized
from evomerge.guard import GuardReport
from evomerge.ledger.location import Location, locate
from evomerge.materialize.adapter import WEIGHTS as ADAPTER_WEIGHTS
from evomerge.mirror import mirror as run_mirror
from evomerge.plan import decisions
from evomerge.records import Measurement, Trial
from evomerge.run import Run, open_run
from evomerge.run import search as run_search
from evomerge.sections import SpaceChanges
from evomerge.space.choice import COEFFICIENT
from evomerge.space.space import Dimension
from evomerge.splits import SPLITS
from evomerge.stages import Stage

NUM_ROWS = 12
console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)


def _command() -> str:
    """How the command is typed here: by its name, or by the path that was used where the name is not found."""
    typed = Path(sys.argv[0])
    return str(typed) if typed.name == "evomerge" and shutil.which("evomerge") is None else "evomerge"


COMMAND = _command()


def say(line: str) -> None:
    """Print a line that people copy from: never broken, however long its paths are."""
    console.print(line, soft_wrap=True)


def make_progress() -> Progress:
    """Return a progress bar with counts, time spent and time left."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class Loading:
    """A status line that says which checkpoint is being loaded, until something better is shown."""

    def __init__(self) -> None:
        self._status = console.status("loading")

    def __call__(self, name: str) -> None:
        """Say what is being loaded."""
        self._status.update(f"loading {name}")

    def __enter__(self) -> "Loading":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away."""
        self._status.stop()


class SearchProgress:
    """A bar a phase; beside the search's, the best of each objective and the hypervolume so far."""

    def __init__(self, location: Location, loading: Loading) -> None:
        self.location = location
        self.has_begun = False
        self._loading, self._progress = loading, make_progress()
        self._task: TaskID | None = None
        self._run: Run | None = None
        self._front: list[Trial] = []
        self._best_M = np.array(-np.inf)  # maximized
        self._counts = {"scored": 0, "stopped": 0, "failed": 0}

    def __enter__(self) -> "SearchProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, stages: Sequence[Stage]) -> None:
        """Say what will be searched."""
        self._loading.stop()
        say(f"search   {_chain(stages)}")

    def phase(self, title: str, total: int, done: int) -> None:
        """Begin a bar; what an earlier process did counts as done."""
        if not self.has_begun:
            self.has_begun = True
            self._progress.start()
        self._task = self._progress.add_task(title, total=total, completed=done, note="", visible=done < total)
        if title == "search":
            self._run = open_run(self.location)
            self._show([trial for trial in self._run.trials if trial.order is not None])

    def advance(self, trial: Trial | None) -> None:
        """Move the bar by one."""
        assert self._task is not None
        if trial is not None:
            self._show([trial])
        self._progress.advance(self._task)

    def note(self, line: str) -> None:
        """Say what is being loaded, or print a line above the bars."""
        if self.has_begun:
            self._progress.console.print(line, soft_wrap=True)
        else:
            self._loading(line)

    def _show(self, trials: Sequence[Trial]) -> None:
        """Show what further trials change; of those before, only the front is kept."""
        assert self._run is not None
        assert self._task is not None
        for trial in trials:
            if trial.measurement is None or trial.measurement.stopped:
                self._counts["stopped" if trial.measurement else "failed"] += 1
                continue
            self._counts["scored"] += 1
            self._best_M = np.maximum(self._best_M, maximized(trial.measurement, self._run.objectives))
        if not self._counts["scored"]:
            return
        self._front = front_of([*self._front, *trials], self._run.objectives)
        volume = front_hypervolume(self._front, self._run.objectives, self._run.searched["base"])
        fates = "".join(f" · {self._counts[fate]} {fate}" for fate in ("stopped", "failed") if self._counts[fate])
        best = [objective.sign * value for objective, value in zip(self._run.steering, self._best_M, strict=True)]
        shown = " ".join(f"{value:.2f}" for value in best[:4]) + (" ..." if len(best) > 4 else "")
        self._progress.update(self._task, note=f"best {shown} · hv {volume:.2g}{fates}")


def print_front(run: Run, *, everything: bool = False) -> None:
    """Print the front beside the reference models: test values with standard errors where the search has ended."""
    if "base" not in run.searched:
        raise RunError(f"{run.location}: nothing has been scored yet; look again in a moment")
    measured = run.tested or run.searched
    split = "test" if run.tested else "search"
    members = sorted(run.front, key=lambda trial: -_mean(run, f"trial:{trial.number}"))
    shown = members if everything else members[:NUM_ROWS]
    knee = run.pick(at_knee=True).number if run.front else None
    if knee is not None and knee not in [trial.number for trial in shown]:
        shown = [*shown[:-1], next(trial for trial in members if trial.number == knee)]
    compact = len(run.objectives) > (3 if run.has_choice else 5)  # the names of operators take their room
    table = Table(
        title=f"{run.campaign.name}: {len(members)} models on the front, scores on {split} items",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for objective in run.objectives:
        table.add_column(objective.name + (" ↓" if objective.direction == "min" else ""), justify="right", no_wrap=True)
    if run.has_one_metric:
        table.add_column("mean", justify="right")
        if run.tested:
            table.add_column("over scalar", justify="right", no_wrap=True)
    for subject in run.references if run.tested else [name for name in ("base", "uniform") if name in measured]:
        table.add_row(subject, *_cells(run, measured, subject, compact=compact), style="dim")
    table.add_section()
    for trial in shown:
        mark = " ◆ knee" if trial.number == knee else ""
        table.add_row(f"{run.label(trial)}{mark}", *_cells(run, measured, f"trial:{trial.number}", compact=compact))
    console.print(table)
    _print_notes(run, len(members) - len(shown), compact=compact)


def search(campaign: Campaign, location: Location, loading: Loading) -> tuple[bool, Run]:
    """Run a campaign behind progress bars; return whether it had been finished before, and the run."""
    progress = SearchProgress(location, loading)
    with progress:
        run = run_search(campaign, location, watcher=progress)
    return not progress.has_begun, run


def print_finished(run: Run, file: Path, *, was_finished: bool) -> None:
    """Print the result of a search, what was decided about its experts, and what to type next."""
    print_front(run)
    for decision in run.facts.get("decisions", ()):
        say(f"decided  {decision}")
    num_trials, budget = len(run.trials), run.campaign.budget.evaluations
    if num_trials < budget:
        say(f"search   ended after {num_trials} of {budget} evaluations: it had nothing left to ask")
    if was_finished:
        remedy = f"; raise budget.evaluations in {file} to extend it" if num_trials == budget else ""
        say(f"this campaign had finished: nothing was done{remedy}")
    whole = sum(run.seconds.values())
    shares = ", ".join(f"{part} {spent / whole:.0%}" for part, spent in run.seconds.items())
    say(f"workers  {whole:.0f} s: {shares}")
    say(f"run      {run.location}")
    if not run.front:
        return
    report = "report {}" if run.location.folder else "report {} --out report.html"
    for number, command in enumerate((report, "export {} --knee --out merged --verify", "front {} --all")):
        say(("next     " if number == 0 else "         ") + f"{COMMAND} " + command.format(run.location.quoted))


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
        dimensions = _some([dimension.name for dimension in plan.space.dimensions])
        table.add_row("space", f"{len(plan.space)} dimensions over {len(plan.groups)} groups ({dimensions})")
        if starts := _starts(plan.space.dimensions):
            table.add_row("start", starts)
    table.add_row("search", _chain(report.stages))
    table.add_row(
        "memory", f"{plan.size_bytes / 1e6:,.1f} MB for base, experts and the merged model; activations come on top"
    )
    table.add_row("merging", f"{_residence(report)}; {report.kernels}")
    table.add_row("one evaluation", f"{_duration(report.evaluation_s)} (timed)")
    bound = "at most" if plan.fidelity else "about"
    table.add_row(
        "whole run",
        f"{bound} {_duration(report.total_s)} for {report.equivalents:.0f} equivalents and "
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


def print_operators() -> None:
    """Print every operator with its parameters (default, searched range) and options."""
    table = Table(title="operators: parameter = default [searched from, to]; * one number for the whole merge")
    for column in ("operator", "gradients", "parameters", "options"):
        table.add_column(column, overflow="fold")
    for name, operator_type in sorted(OPERATORS.items()):
        operator = operator_type()
        parameters = [
            f"{spec.name}{'' if spec.per_expert else '*'} = {spec.default:g} [{spec.low:g}, {spec.high:g}]"
            for spec in operator.parameters
        ]
        options = [f"{key}: {_plain(value)}" for key, value in operator.options.model_dump().items()]
        table.add_row(name, "yes" if operator.differentiable else "", "\n".join(parameters), "\n".join(options))
        table.add_section()
    console.print(table)
    say("A campaign or recipe says: operator: {name: ties, density: 0.3}; the coefficients have their own section.")


def _plain(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _starts(dimensions: Sequence[Dimension]) -> str:
    """Where the coefficients start, expert by expert: a number, or the least and the largest over its groups."""
    starts: dict[str, list[float]] = {}
    for dimension in dimensions:
        if dimension.parameter == COEFFICIENT:
            starts.setdefault(dimension.expert or COEFFICIENT, []).append(dimension.start)
    ends = {name: (f"{min(numbers):.3g}", f"{max(numbers):.3g}") for name, numbers in starts.items()}
    return ", ".join(f"{name} {low}" + (f" to {high}" if high != low else "") for name, (low, high) in ends.items())


def _residence(report: CheckReport) -> str:
    """Where base and experts are while candidates are merged."""
    device, num_bytes = report.plan.place.device, report.plan.device_bytes[report.residence]
    if report.residence == "host":
        return f"on the host, base and experts too; {num_bytes / 1e9:,.1f} GB of the merged model on {device}"
    held = ", task vectors in 8 bits" if report.residence == "int8" else ""
    return f"resident on {device}{held}" + (f", {num_bytes / 1e9:,.1f} GB" if device != "cpu" else "")


def mirror(run: Run, url: str, name: str) -> None:
    """Copy a run into an Optuna study behind a progress bar, and say how to look at it."""
    with make_progress() as progress:
        bar = progress.add_task("mirror", total=None, note="")
        num_added, num_held = run_mirror(
            run, url, name, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    say(f"mirrored {num_added} trials added to the study {name}, which holds {num_held}")
    say(f"next     pip install optuna-dashboard && optuna-dashboard {locate(url)}")


def make_family(name: str, out: Path) -> None:
    """Train a family behind a progress bar, and show what its models score."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(name, total=1.0)
        family = make(name, out, progress=lambda text, share: progress.update(bar, description=text, completed=share))
        progress.update(bar, completed=1.0)
    table = Table(title=f"{name}: scores on held-out items ({', '.join(sorted(set(family.metrics.values())))})")
    table.add_column("model")
    for task in family.metrics:
        table.add_column(task, justify="right")
    for model, scores in family.scores.items():
        table.add_row(model, *(f"{scores[task]:.3f}" for task in family.metrics))
    console.print(table)
    built = "was there already" if family.cached else f"{sum_seconds(family.seconds):.0f} CPU-seconds"
    say(f"family   {out}  ({family.num_parameters / 1e6:.2f} M parameters, {built})")
    for note in family.notes:
        say(f"note     {note}")
    shown = out / "campaign.yaml"
    say(f"next     {COMMAND} check {shown}\n         {COMMAND} search {shown}")


def sum_seconds(seconds: Mapping[str, float]) -> float:
    """Return the total of a family's seconds by part."""
    return seconds.get("total", sum(seconds.values()))


def _chain(stages: Sequence[Stage]) -> str:
    """Name the stages, each with its evaluations and dimensions, and why it was chosen."""
    return ", then ".join(
        f"{stage.proposer} {stage.num_evaluations} in {stage.num_dimensions} dimensions"
        + (f" ({stage.reason})" if stage.reason else "")
        for stage in stages
    )


def _duration(seconds: float) -> str:
    """A time as people say it: 43 ms, 12 s, 3 min, 2.1 h."""
    if seconds < 10:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]}, ..., {names[-1]}"


def _print_notes(run: Run, num_hidden: int, *, compact: bool) -> None:
    if not run.front:
        say("no candidate has succeeded and kept every floor and ceiling: loosen them, or raise the budget")
    if num_hidden:
        say(f"{num_hidden} more on the front: {COMMAND} front {run.location.quoted} --all")
    say(f"hypervolume {run.hypervolume():.4g} above the base, on search items; by those the table is sorted")
    for sentence in (*run.lineage, *claims(run)):
        console.print(f"· {sentence}")
    if run.tested and run.has_one_metric:
        say(f"over scalar: paired difference of the mean to {run.best_scalar}, the best single coefficient")
    failed = [trial for trial in run.trials if trial.failure]
    if failed:
        say(f"{len(failed)} of {len(run.trials)} trials failed; the last: {failed[-1].failure}")
    if run.stopped:
        say(
            f"{len(run.stopped)} of {len(run.trials)} trials were stopped early: all trials together cost "
            f"{run.cost:.0f} full evaluations"
        )
    if compact and run.tested:
        worst = max(score.stderr for measurement in run.tested.values() for score in measurement.scores.values())
        say(f"standard errors of single scores are at most {worst:.3f}")
    if (touches := run.ledger.num_test_touches()) > 1:
        say(f"the test items were used {touches} times: later fronts were chosen knowing more than the search items")


def _cells(run: Run, measured: dict[str, Measurement], subject: str, *, compact: bool) -> list[str]:
    """Return a row's scores with standard errors, their mean, and the paired gain over the best single scalar."""
    scores = [measured[subject].scores[objective.name] for objective in run.objectives]
    cells = [f"{score.value:.3f}" if compact else f"{score.value:.3f} ±{_short(score.stderr)}" for score in scores]
    if run.has_one_metric:
        steering = [measured[subject].scores[objective.name].value for objective in run.steering]
        cells.append(f"{np.mean(steering):.3f}")
        if run.tested:
            gain, error = run.gain(subject, run.best_scalar)
            cells.append("" if subject == run.best_scalar else f"{gain:+.3f} ±{_short(error)}")
    return cells


def _short(error: float) -> str:
    """An error below 1 without its leading zero."""
    return f"{error:.3f}".removeprefix("0")


def _mean(run: Run, subject: str) -> float:
    """The order of the table: by search values, so that test values choose nothing."""
    scores = run.searched[subject].scores
    return float(np.mean([objective.sign * scores[objective.name].value for objective in run.steering]))
