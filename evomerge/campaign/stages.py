"""The chain of searches within a campaign."""

from dataclasses import dataclass, field, replace

from evomerge.campaign.assemble import proposer_type
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import Plan
from evomerge.campaign.sections import SpaceChanges
from evomerge.errors import CampaignError
from evomerge.proposers.adamerging import AdaMerging, AdaMergingOptions
from evomerge.proposers.expert_merging import ExpertMergingOptions
from evomerge.proposers.gradient_front import GradientFront, GradientFrontOptions
from evomerge.proposers.legs import DescentOptions
from evomerge.proposers.proposer import Problem, Proposer
from evomerge.proposers.surrogate import Surrogate, SurrogateOptions
from evomerge.records import Options
from evomerge.space.groups import block_modules

AUTO_LEGS = 6  # of a descent of one objective
AUTO_LEGS_COST = 20.0  # of all of them, in full-evaluation equivalents, at most
AUTO_FRONT = 4  # candidates of the gradient front, beside one for each objective
AUTO_FRONT_COST = 5.0  # of its descent: at some 10 the other searchers are ahead before it has begun to score


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One search: a proposer, its options, how many candidates it may have scored, and in what space.

    changes: how its space differs from the campaign's. num_dimensions: as far as it is known before the search. reason:
    why ``search: auto`` chose it.
    """

    proposer: str
    options: Options
    num_evaluations: int
    changes: SpaceChanges = field(default_factory=SpaceChanges)
    num_dimensions: int = 0
    reason: str = ""

    def make_proposer(self, problem: Problem) -> Proposer:
        """Return its proposer, as it begins. Raises: CampaignError."""
        made: Proposer = proposer_type(self.proposer, "search")(problem, self.options)  # type: ignore[call-arg]
        return made


def make_stages(campaign: Campaign, plan: Plan) -> list[Stage]:
    """Return the campaign's stages; one without a number of its own takes what the others leave of the budget.

    A larger budget lengthens that stage and leaves the others as they were, so that a finished run can be extended.
    Raises: CampaignError if the stages ask for more than the budget, need gradients that the operator has not, or
    cannot be built: a package is missing, an option does not fit the objectives, or a space is none. Spaces that derive
    from trials are tried with each stage's start in place of its best trial.
    """
    stages = _auto(campaign, plan) if isinstance(campaign.search, str) else _listed(campaign)
    course = Course(campaign, plan, [stage.changes for stage in stages])
    return [_tried(stage, number, course, campaign.seed) for number, stage in enumerate(stages)]


def _listed(campaign: Campaign) -> list[Stage]:
    """Return the stages of the file."""
    assert not isinstance(campaign.search, str)
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
    return [
        Stage(
            proposer=stage.proposer,
            options=campaign.stage_options(number),
            num_evaluations=left if stage.evaluations is None else stage.evaluations,
            changes=stage.changes,
        )
        for number, stage in enumerate(campaign.search)
    ]


def _tried(stage: Stage, number: int, course: Course, seed: int) -> Stage:
    """Return the stage with its number of dimensions, once its space and its proposer have been built."""
    try:
        leg = course.leg(number, [])
    except CampaignError as error:
        if stage.changes == SpaceChanges():
            raise
        raise CampaignError(f"search[{number}]: {error}") from error
    plan, of_name = leg.plan, proposer_type(stage.proposer, f"search[{number}].proposer")
    if of_name.needs_gradients and plan.rigid:
        raise CampaignError(
            f"search[{number}].proposer: {stage.proposer} needs gradients, which {plan.rigid} does not "
            "give; use task_arithmetic or linear, or another proposer"
        )
    if isinstance(stage.options, DescentOptions) and stage.options.named_loss not in plan.losses:
        raise CampaignError(
            f"search[{number}]: {stage.proposer} descends the loss {stage.options.named_loss!r}; these evaluators have "
            f"{', '.join(sorted(plan.losses)) or 'none'}; take another loss or proposer"
        )
    if isinstance(stage.options, ExpertMergingOptions):
        blocks = block_modules(tensor.name for tensor in plan.tensors)
        if unknown := set(stage.options.layers) - blocks.keys():
            known = f"0 to {max(blocks)}" if blocks else "none"
            raise CampaignError(
                f"search[{number}].layers: expected transformer blocks of the model, {known}, found {min(unknown)}"
            )
    stage.make_proposer(leg.problem((seed, number)))
    return replace(stage, num_dimensions=len(plan.space))


def stage_cost(plan: Plan, stage: Stage) -> float:
    """Return a stage's full-evaluation equivalents, gradient steps included."""
    if not isinstance(stage.options, DescentOptions):
        return stage.num_evaluations
    return stage.num_evaluations + _descent_cost(plan, stage.options, stage.num_evaluations)


def _descent_cost(plan: Plan, options: DescentOptions, num_trials: int) -> float:
    """Return the full-evaluation equivalents of the descents of so many trials."""
    num_adapt = {task: len(splits["adapt"]) for task, splits in plan.splits.items()}
    num_search = sum(len(splits["search"]) for splits in plan.splits.values())
    return options.num_forwards(num_adapt, num_trials) / num_search


def _affordable(plan: Plan, options: DescentOptions, num_trials: int, most: float) -> DescentOptions:
    """Return options with the largest batches, up to those given, with which descents cost no more than ``most``.

    An evaluation of few items is cheap, a step costs the same. Batches have an item a task at least, whatever it costs.
    """
    for batch_size in range(options.batch_size, 0, -1):
        options = options.model_copy(update={"batch_size": batch_size})
        if _descent_cost(plan, options, num_trials) <= most:
            break
    return options


def _auto(campaign: Campaign, plan: Plan) -> list[Stage]:
    """Descend to a whole front where there are gradients, and go on with surrogates of what was scored.

    The first stage is the same for every budget that it fits into, so that a larger one only lengthens the search.
    """
    budget, stages = campaign.budget.evaluations, []
    num_steering = len(plan.steering)
    if plan.rigid is None and campaign.split.adapt > 0 and "ce" in plan.losses:
        reason = "there are gradients: descend the adapt items' labels"
        if num_steering == 1:
            name, num_trials = AdaMerging.name, AUTO_LEGS
            legs = AdaMergingOptions(loss="ce", steps=25, learning_rate=1e-2)
            options = _affordable(plan, legs, AUTO_LEGS, AUTO_LEGS_COST)
        else:
            name, num_trials = GradientFront.name, AUTO_FRONT + num_steering
            options = _affordable(plan, GradientFrontOptions(), 1, AUTO_FRONT_COST)
            reason += ", to a whole front at once"
        num_evaluations = min(budget, num_trials)
        stages.append(Stage(proposer=name, options=options, num_evaluations=num_evaluations, reason=reason))
        budget -= num_evaluations
    if budget:
        reason = f"{num_steering} objectives, {len(plan.space)} dimensions: model what was scored"
        stages.append(Stage(proposer=Surrogate.name, options=SurrogateOptions(), num_evaluations=budget, reason=reason))
    return stages
