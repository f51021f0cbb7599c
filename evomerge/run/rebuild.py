"""A trial's model, in memory again: the bits that were scored."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from evomerge.campaign.course import Course
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.spaces import operator_of
from evomerge.errors import EvoMergeError
from evomerge.materialize.arrangement import Output
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.merge import Merge, Source
from evomerge.materialize.resident import load_processor
from evomerge.records import Recipe, Trial
from evomerge.run.run import Run, require_same_inputs


class LiveModel(NamedTuple):
    """A transformers model on the run's device, and what makes its inputs: tokenizer or processor of the base."""

    model: Any
    processor: Any | None


def rebuild(
    run: Run, plan: Plan, trial: Trial, recipe: Recipe, loading: Callable[[str], None] = lambda _: None
) -> Materializer:
    """Return a materializer that holds a trial's model.

    Raises: RunError if checkpoints or items changed; EvoMergeError if the tensors are not those that were tested.
    """
    materializer = Materializer(
        plan.base,
        sources_of(plan, recipe),
        dtype=plan.dtype,
        output=Output(layers=recipe.layers),
        place=replace(plan.place, keeps_merge=False),
        progress=loading,
    )
    require_same_inputs(run, materializer.hashes, plan.evaluator.digest)
    materializer.build(operator_of(recipe), recipe)
    require_tested(run, trial, materializer.weights_hash())
    return materializer


def sources_of(plan: Plan, recipe: Recipe) -> tuple[Source, ...]:
    """Return what a recipe of the plan's merges."""
    return tuple(
        Merge(
            name=f"expert {name}",
            recipe=held,
            operator=operator_of(held),
            base=plan.base,
            experts=sources_of(plan, held),
        )
        if isinstance(held, Recipe)
        else plan.experts[name]
        for name, held in recipe.experts.items()
    )


def recipe_of(run: Run, trial: Trial, plan: Plan) -> Recipe:
    """Return a trial's recipe, by the space of its stage; the plan's objectives are the run's."""
    course = Course(run.campaign, plan, run.changes)
    course.leg(trial.stage, run.trials)
    return course.recipe(trial)


def require_tested(run: Run, trial: Trial, weights: str | None) -> None:
    """Raise EvoMergeError if a trial was tested with other tensors than these."""
    tested = run.tested.get(f"trial:{trial.number}")
    if tested and tested.weights != weights:
        raise EvoMergeError(
            f"trial {trial.number}: the rebuilt tensors differ from those that were tested: another device, "
            f"number of threads or version of torch; rebuild where the run was made"
        )


def materialize(run: Run, trial: Trial, loading: Callable[[str], None] = lambda _: None) -> LiveModel:
    """Return a trial's model, alive: in memory on the run's device, ready to predict. Raises: as ``rebuild``."""
    plan = make_plan(run.campaign)
    materializer = rebuild(run, plan, trial, recipe_of(run, trial, plan), loading)
    return LiveModel(materializer.module, load_processor(plan.base))
