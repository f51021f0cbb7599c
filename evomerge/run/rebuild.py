"""A trial's model, in memory again: the bits that were scored."""

from collections.abc import Callable
from typing import Any, NamedTuple

from evomerge.campaign.course import Course
from evomerge.campaign.plan import Plan, make_plan
from evomerge.errors import EvoMergeError
from evomerge.materialize.arrangement import Output
from evomerge.materialize.materializer import Materializer
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
        list(plan.experts.values()),
        dtype=plan.dtype,
        output=Output(layers=recipe.layers),
        place=plan.place,
        progress=loading,
    )
    require_same_inputs(run, materializer.hashes, plan.evaluator.digest)
    materializer.build(plan.operators[recipe.operator], recipe)
    require_tested(run, trial, materializer.weights_hash())
    return materializer


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
