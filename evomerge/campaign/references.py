"""The models that a merge must beat, scored beside the front: outside the budget, and reported."""

from collections.abc import Mapping

from evomerge.campaign.plan import Plan
from evomerge.front.front import maximized
from evomerge.records import Measurement, Recipe

NUM_SCALARS = 11  # the grid of the best single scalar: 0, 0.1, ..., 1


def input_recipes(plan: Plan) -> dict[str, Recipe]:
    """Return base and experts as recipes."""
    num_experts = len(plan.experts)
    recipes = {"base": plan.task_arithmetic([0.0] * num_experts)}
    for k, name in enumerate(plan.experts):
        recipes[f"expert:{name}"] = plan.task_arithmetic([float(k == other) for other in range(num_experts)])
    return recipes


def reference_recipes(plan: Plan) -> dict[str, Recipe]:
    """Return the models that a merge must beat: base, experts, uniform average, and one scalar for all experts."""
    num_experts, recipes = len(plan.experts), input_recipes(plan)
    recipes["uniform"] = plan.task_arithmetic([1 / num_experts] * num_experts)
    for step in range(NUM_SCALARS):
        scalar = step / (NUM_SCALARS - 1)
        recipes[f"scalar:{scalar:g}"] = plan.task_arithmetic([scalar] * num_experts)
    return recipes


def best_scalar(measurements: Mapping[str, Measurement], plan: Plan) -> str:
    """Return the name of the single-scalar reference with the best mean over objectives on search items."""
    scalars = [name for name in measurements if name.startswith("scalar:")]
    return max(scalars, key=lambda name: float(maximized(measurements[name], plan.objectives).mean()))
