"""From a run or a recipe to a checkpoint on disk, and proof that it is the model that was scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evomerge.campaign.plan import Plan, choose_device, decisions, make_plan
from evomerge.campaign.recipe_file import write_recipe
from evomerge.errors import InputError
from evomerge.evaluators.evaluator import ItemScores
from evomerge.interop.read import read_any_recipe
from evomerge.interop.write import write_mergekit
from evomerge.materialize.adapter import CONFIG as ADAPTER_CONFIG
from evomerge.materialize.adapter_write import adapted, merged_adapter, why_no_adapter, write_adapter
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.companions import choose_companions
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.residence import Place
from evomerge.materialize.resident import ResidentModel, load_model
from evomerge.materialize.write import SHARD_SIZE, require_new, require_size, write_checkpoint
from evomerge.publish.card import PICTURE, Written, auto_class, model_card
from evomerge.publish.card_metadata import Input
from evomerge.publish.front_picture import draw_front
from evomerge.records import Split, Trial
from evomerge.run.rebuild import rebuild, recipe_of
from evomerge.run.run import Run
from evomerge.scorer.scorer import objective_score

Loading = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a model is written. shard_size: of its largest file; tokenizer_from: the expert whose tokenizer is taken."""

    shard_size: str = SHARD_SIZE
    tokenizer_from: str | None = None
    as_adapter: bool = False

    @property
    def options(self) -> str:
        """What ``evomerge merge`` is told beside the recipe, to write the same files."""
        return f" --tokenizer-from {self.tokenizer_from}" if self.tokenizer_from else ""


CHECKPOINT = Form()


@dataclass(frozen=True, slots=True)
class Exported:
    """What a person should know of an export.

    loader: the class that loads it, or its base; origin: whose tokenizer and its kin are; fits_adapter: an adapter of
    the base would do.
    """

    loader: str
    origin: str
    notes: tuple[str, ...]
    fits_adapter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One objective of an exported model, re-scored, beside what the ledger holds."""

    split: Split
    objective: str
    rescored: float
    recorded: float
    num_changed_items: int


def export_trial(run: Run, trial: Trial, out: Path, loading: Loading, form: Form = CHECKPOINT) -> Exported:
    """Write a trial's model with its recipe, model card and lineage.

    Raises: InputError if the form does not suit the merge; RunError if the checkpoints changed; EvoMergeError if the
    tensors are not those that were tested.
    """
    require_new(out)
    require_size(form.shard_size)
    plan = make_plan(run.campaign)
    companions = choose_companions(plan.base, plan.experts, form.tokenizer_from)
    recipe = recipe_of(run, trial, plan)
    operator = plan.operators[recipe.operator]
    reason = why_no_adapter(operator, plan.experts)
    if form.as_adapter and reason:
        raise InputError(f"--as-adapter: {reason}; leave the option out")
    materializer = rebuild(run, plan, trial, recipe, loading)
    weights, architecture = materializer.weights_hash(), type(materializer.module).__name__

    def add(folder: Path) -> None:
        companions.copy(folder)
        write_recipe(recipe, folder / "recipe.yaml")
        inexpressible = write_mergekit(recipe, (plan.base, *plan.experts.values()), folder / "mergekit.yaml")
        written = Written(
            recipe=recipe,
            inputs=_inputs(run, plan),
            architecture=architecture,
            weights=weights,
            origin=companions.origin,
            picture=draw_front(run, trial, folder / PICTURE),
            inexpressible=inexpressible,
            is_adapter=form.as_adapter,
            options=form.options,
        )
        (folder / "README.md").write_text(model_card(run, trial, written), encoding="utf-8")

    if form.as_adapter:
        merged = merged_adapter(materializer, operator, recipe)
        write_adapter(materializer, merged, plan.base, out, add)
    else:
        write_checkpoint(materializer, out, add, shard_size=form.shard_size)
    fits_adapter = reason is None and not form.as_adapter
    return Exported(auto_class(architecture), companions.origin, companions.notes, fits_adapter)


def _inputs(run: Run, plan: Plan) -> dict[str, Input]:
    """Return base and experts as the card shows them."""
    experts = {name: Input(run.campaign.experts[name], expert.folder) for name, expert in plan.experts.items()}
    return {"base": Input(run.campaign.base, plan.base.folder), **experts}


def merge_recipe(
    path: Path,
    out: Path,
    device: str,
    loading: Loading,
    say: Callable[[str], None] = lambda _: None,
    form: Form = CHECKPOINT,
) -> str:
    """Build the model of a recipe file, ours or mergekit's, at ``out``; return the hash of its tensors.

    say is told what of the file has no effect, what was decided about experts unlike the base, whose tokenizer was
    taken, and why mergekit cannot make the same merge.
    """
    require_new(out)
    require_size(form.shard_size)
    read = read_any_recipe(path)
    for note in read.notes:
        say(f"note     {note}")
    for decision in decisions(read.experts, read.recipe.dtype):
        say(f"decided  {decision}")
    experts = dict(zip(read.recipe.experts, read.experts, strict=True))
    companions = choose_companions(read.base, experts, form.tokenizer_from)
    if companions.origin:
        say(f"tokens   {companions.origin}")
    for note in companions.notes:
        say(f"note     {note}")
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
        companions.copy(folder)
        write_recipe(read.recipe, folder / "recipe.yaml")
        if inexpressible := write_mergekit(read.recipe, (read.base, *read.experts), folder / "mergekit.yaml"):
            say(f"note     no mergekit.yaml: {inexpressible}")

    return write_checkpoint(materializer, out, add, shard_size=form.shard_size)


def verify_export(run: Run, trial: Trial, folder: Path, loading: Loading) -> list[Verification]:
    """Load an exported model as any user would and score it on the items of the ledger's measurements.

    An adapter is merged into the base.
    """
    loading(str(folder))
    plan = make_plan(run.campaign)
    alone = replace(plan.place, residence="auto" if plan.place.residence == "auto" else "host")
    if (folder / ADAPTER_CONFIG).is_file():
        model = adapted(plan.base, folder, plan.dtype, alone).module
    else:
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
