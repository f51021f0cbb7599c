"""The objectives of a campaign: its metrics as the evaluator has them, and the summaries of several."""

from collections.abc import Mapping
from dataclasses import replace

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.sections import ObjectiveSection
from evomerge.errors import CampaignError, did_you_mean
from evomerge.evaluators.evaluator import Evaluator
from evomerge.evidence.scores import Aggregate
from evomerge.records import Objective


def make_objectives(campaign: Campaign, evaluator: Evaluator) -> tuple[Objective, ...]:
    """Return the objectives in the order of the file, metrics and directions checked. Raises: CampaignError."""
    measured = {
        section.name: _measured(section, f"objectives[{number}]", evaluator)
        for number, section in enumerate(campaign.objectives)
        if section.task
    }
    summaries = {
        section.name: _summary(section, f"objectives[{number}]", measured)
        for number, section in enumerate(campaign.objectives)
        if not section.task
    }
    parts = {part for summary in summaries.values() for part in summary.parts}
    objectives = {**measured, **summaries}
    return tuple(replace(objectives[section.name], steers=section.name not in parts) for section in campaign.objectives)


def aggregate_of(objective: Objective, evaluator: Evaluator) -> Aggregate | None:
    """Return how items make the score of an objective, if that is no mean."""
    return None if objective.summary else evaluator.metrics(objective.task)[objective.metric].aggregate


def _measured(section: ObjectiveSection, where: str, evaluator: Evaluator) -> Objective:
    assert section.task is not None
    assert section.metric is not None
    metrics = evaluator.metrics(section.task)
    if section.metric not in metrics:
        known = did_you_mean(section.metric, metrics)
        raise CampaignError(f"{where}.metric: task {section.task} has no {section.metric!r}{known}")
    better = metrics[section.metric].direction
    direction = section.direction or better
    if direction is None:
        raise CampaignError(
            f"{where}.direction: {section.metric} does not say which way is better; give direction: max or min"
        )
    if better and direction != better:
        raise CampaignError(
            f"{where}.direction: {section.metric} is better {'larger' if direction == 'min' else 'smaller'}; leave the "
            "direction out"
        )
    return Objective(
        name=section.name,
        task=section.task,
        metric=section.metric,
        direction=direction,
        floor=section.floor,
        ceiling=section.ceiling,
    )


def _summary(section: ObjectiveSection, where: str, measured: Mapping[str, Objective]) -> Objective:
    directions = {measured[part].direction for part in section.parts}
    if len(directions) > 1:
        found = ", ".join(f"{part} ({measured[part].direction})" for part in section.parts)
        raise CampaignError(f"{where}: expected objectives that are all better larger or all smaller, found {found}")
    return Objective(
        name=section.name,
        direction=directions.pop(),
        floor=section.floor,
        ceiling=section.ceiling,
        summary="mean" if section.mean else "worst",
        parts=tuple(section.parts),
        normalized_by=section.normalized_by,
    )
