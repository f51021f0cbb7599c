"""The chain of searches within a campaign."""

from dataclasses import dataclass

from evomerge.assemble import PROPOSERS
from evomerge.campaign import Campaign
from evomerge.errors import CampaignError
from evomerge.plan import Plan
from evomerge.proposers.adamerging import AdaMerging, AdaMergingOptions
from evomerge.records import Options
from evomerge.scorer import BACKWARD_COST

AUTO_DESCENT_COST = 30.0
AUTO_MAX_LEGS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One search: a proposer, its options, and how many candidates it may have scored."""

    proposer: str
    options: Options
    num_evaluations: int
    reason: str = ""
    """Why ``search: auto`` chose it."""


def make_stages(campaign: Campaign, plan: Plan) -> list[Stage]:
    """Return the campaign's stages; one without a number of its own takes what the others leave of the budget.

    A larger budget lengthens that stage and leaves the others as they were, so that a finished run can be extended.
    Raises: CampaignError if the stages ask for more than the budget, or need gradients that the operator has not.
    """
    if campaign.search == "auto":
        return _auto(campaign, plan)
    left = campaign.budget.evaluations - sum(stage.evaluations or 0 for stage in campaign.search)
    open_ended = [number for number, stage in enumerate(campaign.search) if stage.evaluations is None]
    if len(open_ended) > 1:
        raise CampaignError(
            f"search[{open_ended[1]}]: only one stage may go without evaluations; give this one a number"
        )
    if left < len(open_ended):
        raise CampaignError(
            f"search: the stages take {campaign.budget.evaluations - left} evaluations and leave {left} of "
            f"budget.evaluations = {campaign.budget.evaluations}; raise the budget or lower a stage"
        )
    stages = []
    for number, stage in enumerate(campaign.search):
        if PROPOSERS[stage.proposer].needs_gradients and plan.rigid:
            raise CampaignError(
                f"search[{number}].proposer: {stage.proposer} needs gradients, which {plan.rigid} does not "
                "give; use task_arithmetic or linear, or another proposer"
            )
        stages.append(
            Stage(
                proposer=stage.proposer,
                options=campaign.stage_options(number),
                num_evaluations=left if stage.evaluations is None else stage.evaluations,
            )
        )
    return stages


def descent_cost(plan: Plan, options: Options) -> float:
    """Return the full-evaluation equivalents of the gradient steps before each of a proposer's evaluations."""
    settings = options.model_dump()
    if "steps" not in settings:
        return 0.0
    num_items = sum(min(settings["batch_size"], len(splits["adapt"])) for splits in plan.splits.values())
    num_search = sum(len(splits["search"]) for splits in plan.splits.values())
    return float(BACKWARD_COST * settings["steps"] * num_items / num_search)


def _auto(campaign: Campaign, plan: Plan) -> list[Stage]:
    """Descend the labels of the adapt items where there are gradients, then search around where that ends.

    The descents cost at most AUTO_DESCENT_COST, whatever the budget, so that a larger budget only lengthens the search.
    """
    budget, stages = campaign.budget.evaluations, []
    num_steering = sum(objective.steers for objective in plan.objectives)
    if plan.rigid is None and campaign.split.adapt > 0 and "ce" in plan.evaluator.losses:
        options = AdaMergingOptions(loss="ce", steps=25, learning_rate=1e-2)
        num_legs = int(AUTO_DESCENT_COST / (1 + descent_cost(plan, options)))
        num_legs = min(max(1, num_legs), AUTO_MAX_LEGS, budget)
        stages.append(
            Stage(
                proposer=AdaMerging.name,
                options=options,
                num_evaluations=num_legs,
                reason="there are gradients: descend the adapt items' labels",
            )
        )
        budget -= num_legs
    name, reason = ("cma_es", "one objective") if num_steering == 1 else ("nsga2", "several objectives")
    if budget:
        defaults = PROPOSERS[name].options_type()
        stages.append(Stage(proposer=name, options=defaults, num_evaluations=budget, reason=reason))
    return stages
