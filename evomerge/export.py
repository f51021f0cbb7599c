"""From a run or a recipe to a checkpoint on disk, and proof that it is the model that was scored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evomerge.card import model_card
from evomerge.errors import EvoMergeError, RunError
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import load_model
from evomerge.materialize.write import require_new, write_checkpoint
from evomerge.plan import choose_device, make_plan
from evomerge.recipe_file import read_recipe, write_recipe
from evomerge.records import Split, Trial
from evomerge.run import Run, require_same_inputs
from evomerge.scorer import score_of

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
    materializer = Materializer(
        plan.base, list(plan.experts.values()), dtype=plan.dtype, device=plan.device, progress=loading
    )
    require_same_inputs(run, plan, materializer.hashes)
    recipe = plan.recipe(trial.point)
    materializer.build(plan.operator, recipe)
    tested = run.tested.get(f"trial:{trial.number}")
    if tested and tested.weights != materializer.weights_hash():
        raise EvoMergeError(
            f"trial {trial.number}: the rebuilt tensors differ from those that were tested: another device or another "
            f"version of torch; rebuild where the run was made"
        )

    def add(folder: Path) -> None:
        write_recipe(recipe, folder / "recipe.yaml")
        (folder / "README.md").write_text(model_card(run, trial, recipe))

    write_checkpoint(materializer, plan.base, out, add)


def merge_recipe(path: Path, out: Path, device: str, loading: Loading) -> str:
    """Build the model of a recipe file at ``out``; return the hash of its tensors."""
    require_new(out)
    read = read_recipe(path)
    materializer = Materializer(
        read.base, read.experts, dtype=read.recipe.dtype, device=choose_device(device), progress=loading
    )
    materializer.build(read.operator, read.recipe)
    return write_checkpoint(
        materializer, read.base, out, lambda folder: write_recipe(read.recipe, folder / "recipe.yaml")
    )


def verify_export(run: Run, trial: Trial, folder: Path, loading: Loading) -> list[Verification]:
    """Load an exported model as any user would and score it on the items of the ledger's measurements."""
    loading(str(folder))
    plan = make_plan(run.campaign)
    model = load_model(open_checkpoint(str(folder), folder), plan.dtype).to(torch.device(plan.device))
    rows = []
    for split, measured in (("search", run.searched), ("test", run.tested)):
        recorded = measured.get(f"trial:{trial.number}")
        for objective in run.objectives if recorded else ():
            assert recorded is not None
            loading(f"and scoring {objective.name} on {split} items")
            items = plan.splits[objective.task][split]  # type: ignore[index]
            score = score_of(plan.evaluator.score(model, objective.task, items)[objective.metric])
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
