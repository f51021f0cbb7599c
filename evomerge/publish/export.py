"""From a run or a recipe to a checkpoint on disk, and proof that it is the model that was scored."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from evomerge.campaign.campaign import HUB_ID
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.recipe_file import write_recipe
from evomerge.campaign.spaces import operator_of
from evomerge.errors import EvoMergeError, InputError
from evomerge.evaluators.evaluator import ItemScores
from evomerge.interop.read import read_any_recipe
from evomerge.interop.write import write_mergekit
from evomerge.materialize.adapter import CONFIG as ADAPTER_CONFIG
from evomerge.materialize.adapter_write import adapted, merged_adapter, why_no_adapter, write_adapter
from evomerge.materialize.checkpoint import open_checkpoint, read_json
from evomerge.materialize.companions import choose_companions
from evomerge.materialize.inputs import decisions
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.merge import Merge
from evomerge.materialize.residence import Place, choose_device
from evomerge.materialize.resident import ResidentModel, load_model
from evomerge.materialize.write import SHARD_SIZE, require_new, require_size, write_checkpoint
from evomerge.publish.card import PICTURE, Written, auto_class, model_card
from evomerge.publish.card_metadata import Input, public_names
from evomerge.publish.front_picture import draw_front
from evomerge.records import Recipe, Split, Trial
from evomerge.run.rebuild import rebuild, recipe_of, sources_of
from evomerge.run.run import Run
from evomerge.scorer.scorer import objective_score

Loading = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a model is written.

    shard_size: of its largest file; tokenizer_from: the expert whose tokenizer is taken; is_public: no file holds a
    path of this machine, so that the folder can be handed on as it is.
    """

    shard_size: str = SHARD_SIZE
    tokenizer_from: str | None = None
    as_adapter: bool = False
    is_public: bool = False

    @property
    def options(self) -> str:
        """What ``evomerge merge`` is told beside the recipe, to write the same files."""
        return f" --tokenizer-from {self.tokenizer_from}" if self.tokenizer_from else ""


CHECKPOINT = Form()
PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""Keys under which libraries note in a configuration where a checkpoint lay."""
PATHLESS = "what is uploaded names folders without their paths; export without --push for a recipe that merges here"


@dataclass(frozen=True, slots=True)
class Exported:
    """What a person should know of an export.

    weights: SHA-256 of the merged tensors; loader: the class that loads it, or its base; origin: whose tokenizer and
    its kin are; fits_adapter: an adapter of the base would do.
    """

    weights: str
    loader: str
    origin: str
    notes: tuple[str, ...]
    fits_adapter: bool


@dataclass(frozen=True, slots=True)
class Merged:
    """What a person should know of a merge without a search.

    weights: SHA-256 of its tensors; decisions: about experts unlike the base; origin: whose tokenizer and its kin are;
    notes: what of the file has no effect, and why mergekit cannot make the same merge.
    """

    weights: str
    decisions: tuple[str, ...]
    origin: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One objective of an exported model, re-scored, beside what the ledger holds."""

    split: Split
    objective: str
    rescored: float
    recorded: float
    num_changed_items: int

    @property
    def is_same(self) -> bool:
        """Whether both are equal to the last digit."""
        return self.rescored == self.recorded


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
    operator = operator_of(recipe)
    reason = why_no_adapter(operator, plan.experts)
    if form.as_adapter and reason:
        raise InputError(f"--as-adapter: {reason}; leave the option out")
    materializer = rebuild(run, plan, trial, recipe, loading)
    weights, architecture = materializer.weights_hash(), type(materializer.module).__name__
    inputs = _inputs(run, plan)
    shown = _public(recipe, inputs) if form.is_public else recipe

    def add(folder: Path) -> None:
        companions.copy(folder)
        write_recipe(shown, folder / "recipe.yaml")
        inexpressible = write_mergekit(shown, (plan.base, *sources_of(plan, recipe)), folder / "mergekit.yaml")
        if form.is_public:
            _hide_paths(folder, inputs)
        written = Written(
            recipe=shown,
            inputs=inputs,
            architecture=architecture,
            weights=weights,
            origin=companions.origin,
            picture=draw_front(run, trial, folder / PICTURE),
            inexpressible=inexpressible,
            is_adapter=form.as_adapter,
            is_public=form.is_public,
            options=form.options,
        )
        (folder / "README.md").write_text(model_card(run, trial, written), encoding="utf-8")

    if form.as_adapter:
        merged = merged_adapter(materializer, operator, recipe)
        write_adapter(materializer, merged, plan.base, out, add)
    else:
        write_checkpoint(materializer, out, add, shard_size=form.shard_size)
    fits_adapter = reason is None and not form.as_adapter
    notes = [
        *companions.notes,
        *([PATHLESS] if form.is_public and any(not of.hub_id for of in inputs.values()) else []),
    ]
    return Exported(weights, auto_class(architecture), companions.origin, tuple(notes), fits_adapter)


def _inputs(run: Run, plan: Plan) -> dict[str, Input]:
    """Return base and experts as the card shows them."""
    experts = {name: Input(run.campaign.experts[name], expert.folder) for name, expert in plan.experts.items()}
    return {"base": Input(run.campaign.base, plan.base.folder), **experts}


def _public(recipe: Recipe, inputs: Mapping[str, Input]) -> Recipe:
    """Return a recipe that names its checkpoints as others may know them."""
    names = public_names(inputs)
    experts = {
        name: _public(held, inputs) if isinstance(held, Recipe) else names[name]
        for name, held in recipe.experts.items()
    }
    return replace(recipe, base=names["base"], experts=experts)


def _hide_paths(folder: Path, inputs: Mapping[str, Input]) -> None:
    """Have the configurations of a folder name checkpoints as others may know them, or by their last name alone."""
    names = {str(inputs[name].folder): public for name, public in public_names(inputs).items()}

    def named(place: str) -> str:
        return names.get(place) or (place if HUB_ID.fullmatch(place) else PurePath(place).name)

    def hidden(data: Any) -> Any:
        if isinstance(data, list):
            return [hidden(inner) for inner in data]
        if not isinstance(data, dict):
            return data
        return {
            key: named(inner) if key in PLACES and isinstance(inner, str) else hidden(inner)
            for key, inner in data.items()
        }

    for path in folder.glob("*config.json"):
        data = read_json(path.name, path)
        if (public := hidden(data)) != data:
            path.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def merge_recipe(path: Path, out: Path, device: str, loading: Loading, form: Form = CHECKPOINT) -> Merged:
    """Build the model of a recipe file, ours or mergekit's, at ``out``. Raises: InputError."""
    require_new(out)
    require_size(form.shard_size)
    read = read_any_recipe(path)
    by_name = zip(read.recipe.experts, read.experts, strict=True)
    experts = {name: expert for name, expert in by_name if not isinstance(expert, Merge)}
    companions = choose_companions(read.base, experts, form.tokenizer_from)
    notes = [*read.notes, *companions.notes]
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
            notes.append(f"no mergekit.yaml: {inexpressible}")

    weights = write_checkpoint(materializer, out, add, shard_size=form.shard_size)
    decided = decisions(read.experts, read.recipe.dtype)
    return Merged(weights, tuple(decided), companions.origin, tuple(notes))


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


def require_same_scores(rows: Sequence[Verification]) -> None:
    """Raise EvoMergeError if an exported model does not score what the ledger says."""
    if not all(row.is_same for row in rows):
        raise EvoMergeError("the exported model does not score what the ledger says; rebuild it where the run was made")
