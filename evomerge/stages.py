"""The chain of searches within a campaign."""

from dataclasses import dataclass

from evomerge.assemble import PROPOSERS
from evomerge.campaign import Campaign
from evomerge.errors import CampaignError
from evomerge.plan import Plan
from evomerge.records import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One search: a proposer, its options, and how many candidates it may have scored."""

    proposer: str
    options: Options
    num_evaluations: int


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
        if PROPOSERS[stage.proposer].needs_gradients and not plan.operator.differentiable:
            raise CampaignError(
                f"search[{number}].proposer: {stage.proposer} needs gradients, which {plan.operator.name} does not "
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


def _auto(campaign: Campaign, plan: Plan) -> list[Stage]:
    """One objective: CMA-ES. Several: NSGA-II, its population no larger than a small budget can turn over."""
    name = "cma_es" if len(plan.objectives) == 1 else "nsga2"
    options = PROPOSERS[name].options_type()
    return [Stage(proposer=name, options=options, num_evaluations=campaign.budget.evaluations)]
