"""Driving a campaign: its run is started, gone on with, or found finished."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import Findings, Plan, make_plan
from evomerge.campaign.stages import make_stages
from evomerge.driver.draining import Draining
from evomerge.driver.driver import Driver
from evomerge.driver.log import Log
from evomerge.driver.watcher import Watcher, Watchers
from evomerge.errors import RunError
from evomerge.evidence.summary import all_sources
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, locate
from evomerge.materialize.inputs import decisions
from evomerge.records import digest
from evomerge.run.run import Run, open_run, require_same_inputs, run_of
from evomerge.run.tracking import Tracking
from evomerge.scorer import pools
from evomerge.trackers import require_clients


def search(
    campaign: Campaign,
    location: str | Path | Location,
    *,
    watcher: Watcher | None = None,
) -> Run:
    """Start the campaign's run at a location, resume it, or find it finished; return it finished.

    location: a folder, or ``URL#NAME``; in a database, a run without a name has the campaign's. Raises: RunError if
    another campaign's run is there, or another process drives it.
    """
    location = locate(location).called(campaign.name)
    Ledger.upgrade(location)
    if Ledger.exists(location):
        run = open_run(location)
        _require_same_meaning(run, campaign)
        if run.is_finished and campaign.budget.evaluations <= run.campaign.budget.evaluations:
            return run
    log = Log(location, campaign)
    shown = Watchers([log, *([watcher] if watcher else [])])
    with closing(Ledger.drive(location, campaign.name, shown.note)) as ledger:
        plan = make_plan(campaign)
        make_stages(campaign, plan)  # mistakes come to light before the weights are loaded
        require_clients(campaign.trackers)
        identity = f"{campaign.name}-{digest(ledger.created())[:12]}"
        tracking = Tracking(campaign, location, identity, shown.note)
        watcher = Watchers([tracking, shown])
        with (
            log.session(resumed=ledger.has_begun),
            tracking,
            pools.open_pool(campaign, plan, watcher.note) as (pool, findings),
        ):
            plan = plan.with_findings(findings)
            stages = make_stages(campaign, plan)  # with what the workers have found out
            dumped = campaign.model_dump(mode="json")
            if ledger.has_begun:
                run = run_of(ledger)
                _require_same_meaning(run, campaign)  # again: nobody else can write now
                require_same_inputs(run, findings.hashes, findings.items)
                ledger.update_campaign(dumped)
            else:
                ledger.begin(dumped, _facts(plan, findings))
            watcher.begin(stages)
            course = Course(campaign, plan, [stage.changes for stage in stages])
            with Draining(watcher.note) as draining:
                Driver(plan, ledger, pool, findings.hashes, watcher, draining).run(stages, course, campaign.seed)
            ledger.finish(campaign.budget.evaluations)
    return open_run(location)


def _facts(plan: Plan, findings: Findings) -> dict[str, Any]:
    """What readers of a run need and the campaign file does not say."""
    return {
        "objectives": [asdict(objective) for objective in plan.objectives],
        "hashes": findings.hashes,
        "decisions": decisions(plan.experts.values(), plan.dtype),
        "items": findings.items,
        "sums": {measure: sums_KS.tolist() for measure, sums_KS in findings.sums.items()},
        "losses": sorted(findings.losses),
        "sources": {split: all_sources(plan.objectives, plan.sources(split)) for split in ("search", "test")},
        "stages": [],
    }


def _require_same_meaning(run: Run, campaign: Campaign) -> None:
    before, now = run.campaign.meaning(), campaign.meaning()
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        raise RunError(
            f"{run.location} holds a run of a campaign that differs in {', '.join(differing)}; "
            "its scores do not compare: rename this campaign, or give another place with --run"
        )
    if campaign.budget.evaluations < len(run.trials):
        raise RunError(
            f"budget.evaluations: {campaign.budget.evaluations}, but {run.location} holds {len(run.trials)} trials; "
            "a budget can only grow"
        )
