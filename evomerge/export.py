"""From a run or a recipe to a checkpoint on disk, and proof that it is the model that was scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evomerge.card import model_card
from evomerge.course import Course
from evomerge.errors import EvoMergeError, RunError
from evomerge.evaluators.evaluator import ItemScores
from evomerge.interop.read import read_any_recipe
from evomerge.interop.write import write_mergekit
from evomerge.materialize.arrangement import Output
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.residence import Place
from evomerge.materialize.resident import ResidentModel, load_model
from evomerge.materialize.write import require_new, write_checkpoint
from evomerge.plan import choose_device, decisions, make_plan
from evomerge.recipe_file import write_recipe
from evomerge.records import Split, Trial
from evomerge.run import Run, require_same_inputs
from evomerge.scorer import objective_score

Loading = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One objective of an exported model, re-scored, beside what the ledger holds."""

    split: Split
    objective: str
    rescored: float
    recorded: float
    num_changed_items: int


def export_trial(run: Run, trial: Trial, out: Path, loading: Loading) -> None:
    """Write a trial's model with its recipe, model card and lineage.

    Raises: RunError if the checkpoints changed; EvoMergeError if the tensors are not those that were tested.
    """
    require_new(out)
    plan = make_plan(run.campaign)
    course = Course(run.campaign, plan, run.changes)
    course.leg(trial.stage, run.trials)
    recipe = course.recipe(trial)
    materializer = Materializer(
        plan.base,
        list(plan.experts.values()),
        dtype=plan.dtype,
        output=Output(layers=recipe.layers),
        place=plan.place,
        progress=loading,
    )
    require_same_inputs(run, materializer.hashes, plan.evaluator.digest)
    materializer.build(plan.operators[recipe.operator], recipe)
    tested = run.tested.get(f"trial:{trial.number}")
    if tested and tested.weights != materializer.weights_hash():
        raise EvoMergeError(
            f"trial {trial.number}: the rebuilt tensors differ from those that were tested: another device, "
            f"number of threads or version of torch; rebuild where the run was made"
        )

    def add(folder: Path) -> None:
        write_recipe(recipe, folder / "recipe.yaml")
        inexpressible = write_mergekit(recipe, (plan.base, *plan.experts.values()), folder / "mergekit.yaml")
        (folder / "README.md").write_text(model_card(run, trial, recipe, inexpressible))

    write_checkpoint(materializer, plan.base, out, add)


def merge_recipe(
    path: Path, out: Path, device: str, loading: Loading, say: Callable[[str], None] = lambda _: None
) -> str:
    """Build the model of a recipe file, ours or mergekit's, at ``out``; return the hash of its tensors.

    say is told what of the file has no effect, what was decided about experts unlike the base, and why mergekit cannot
    make the same merge.
    """
    require_new(out)
    read = read_any_recipe(path)
    for note in read.notes:
        say(f"note     {note}")
    for decision in decisions(read.experts, read.recipe.dtype):
        say(f"decided  {decision}")
    materializer = Materializer(
        read.base,
        read.experts,
        dtype=read.recipe.dtype,
        output=read.output,
        place=Place(
            device=choose_device(device),
            residence="int8" if read.recipe.int8 else "auto",
            factored=read.operator.reads_factors,
        ),
        progress=loading,
    )
    materializer.build(read.operator, read.recipe)

    def add(folder: Path) -> None:
        write_recipe(read.recipe, folder / "recipe.yaml")
        if inexpressible := write_mergekit(read.recipe, (read.base, *read.experts), folder / "mergekit.yaml"):
            say(f"note     no mergekit.yaml: {inexpressible}")

    return write_checkpoint(materializer, read.base, out, add)


def verify_export(run: Run, trial: Trial, folder: Path, loading: Loading) -> list[Verification]:
    """Load an exported model as any user would and score it on the items of the ledger's measurements."""
    loading(str(folder))
    plan = make_plan(run.campaign)
    alone = replace(plan.place, residence="auto" if plan.place.residence == "auto" else "host")
    settled = alone.choose(plan.device_bytes)
    model = ResidentModel(load_model(open_checkpoint(str(folder), folder), plan.dtype), settled.rooms).module
    rows = []
    for split, measured in (("search", run.searched), ("test", run.tested)):
        recorded = measured.get(f"trial:{trial.number}")
        reported: dict[str, ItemScores] = {}
        for objective in plan.measured if recorded else ():
            assert recorded is not None
            items = plan.splits[objective.task][recorded.split]
            if objective.task not in reported:
                loading(f"and scoring {objective.task} on {split} items")
                reported[objective.task] = plan.evaluator.score(model, objective.task, items)
            score = objective_score(plan, objective, reported[objective.task], items)
            before = recorded.scores[objective.name]
            rows.append(
                Verification(
                    split=recorded.split,
                    objective=objective.name,
                    rescored=score.value,
                    recorded=before.value,
                    num_changed_items=int(np.count_nonzero(score.items != before.items)),
                )
            )
    return rows


def parse_preference(text: str) -> dict[str, float]:
    """Read ``a=2,b=1``. Raises: RunError."""
    preference = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            preference[name.strip()] = float(weight)
        except ValueError as error:
            raise RunError(f"--prefer: expected NAME=WEIGHT,... such as a=2,b=1, found {part!r}") from error
    return preference
