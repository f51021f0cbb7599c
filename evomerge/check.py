"""What a campaign will do and cost, found out before anything expensive."""

from collections.abc import Callable
from dataclasses import dataclass

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.references import reference_recipes
from evomerge.campaign.stages import Stage, make_stages, stage_cost
from evomerge.errors import CandidateError, EvoMergeError
from evomerge.materialize.bandwidth import Bandwidth, measure_bandwidth, merge_seconds
from evomerge.materialize.guard import GuardReport, inspect_experts
from evomerge.materialize.residence import Residence
from evomerge.materialize.spread import Room
from evomerge.records import Measurement
from evomerge.scorer.scorer import Scorer
from evomerge.trackers import require_clients


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The plan, its stages, the timed evaluation of the base, and what follows for the whole run."""

    campaign: Campaign
    plan: Plan
    stages: list[Stage]
    guard: GuardReport
    residence: Residence
    devices: tuple[Room, ...]
    """What the merged model takes on each of its devices."""
    kernels: str
    """How merges are computed, in words."""
    bandwidth: Bandwidth
    """Measured with copies, just now."""
    evaluation: Measurement
    equivalents: float
    """Full-evaluation equivalents of the search, descents included; references and the final test come on top."""
    reference_evaluations: int

    @property
    def evaluation_s(self) -> float:
        """Seconds of the timed evaluation: one candidate on all search items."""
        return sum(self.evaluation.seconds.values())

    @property
    def merge_s(self) -> float:
        """Seconds that a merge of all tensors takes at least: memory has to move them."""
        return merge_seconds(self.plan.device_bytes, self.bandwidth)[self.residence]

    @property
    def total_s(self) -> float:
        """Seconds of the run, by that evaluation; proposing and the final test scores of the front not counted."""
        return self.evaluation_s * (self.equivalents + self.reference_evaluations)


def check_campaign(campaign: Campaign, loading: Callable[[str], None]) -> CheckReport:
    """Make the plan, load the checkpoints and time one evaluation (the second: the first warms up).

    Raises: InputError for whatever a run would stumble over; EvoMergeError if the base cannot be scored.
    """
    plan = make_plan(campaign)
    make_stages(campaign, plan)  # mistakes come to light before the weights are loaded
    require_clients(campaign.trackers)
    scorer = Scorer(plan, loading)
    plan = scorer.plan
    stages = make_stages(campaign, plan)  # with what the rehearsal showed of the evaluator
    loading("and comparing task vectors")
    guard = inspect_experts(scorer.materializer.sources, list(plan.experts), plan.base.config)
    recipes = reference_recipes(plan)
    loading("and timing one evaluation")
    try:
        scorer.score(recipes["uniform"], "search")
        evaluation = scorer.score(recipes["base"], "search")
    except CandidateError as error:
        raise EvoMergeError(f"the base cannot be scored: {error}") from error
    return CheckReport(
        campaign=campaign,
        plan=plan,
        stages=stages,
        guard=guard,
        residence=scorer.materializer.residence,
        devices=scorer.materializer.resident.devices,
        kernels=scorer.materializer.kernels,
        bandwidth=measure_bandwidth(scorer.materializer.resident.devices[0].device),
        evaluation=evaluation,
        equivalents=sum(stage_cost(plan, stage) for stage in stages),
        reference_evaluations=len(recipes),
    )
