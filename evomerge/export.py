"""From a run or a recipe to a checkpoint on disk, and proof that it is the model that was scored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evomerge.card import model_card
from evomerge.evaluators.evaluator import ItemScores
from evomerge.interop.read import read_any_recipe
from evomerge.interop.write import write_mergekit
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.residence import Place
from evomerge.materialize.resident import load_model
from evomerge.materialize.write import require_new, write_checkpoint
from evomerge.plan import choose_device, decisions, make_plan
from evomerge.rebuild import rebuild
from evomerge.recipe_file import write_recipe
from evomerge.records import Split, Trial
from evomerge.run import Run
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
    plan, recipe, materializer = rebuild(run, trial, loading)

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
    model = load_model(open_checkpoint(str(folder), folder), plan.dtype).to(torch.device(plan.place.device))
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
