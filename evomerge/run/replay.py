"""Replays a run: every trial is proposed again from the record, as its driver proposed it, and nothing is scored.

What a proposer asks next depends on its problem and on its stage's record (see ``proposers/proposer.py``), and both are
in the ledger: which candidates were asked, which results had come by then, and what the workers had found out before
the first. So every proposal can be had again to the last digit, whatever the number of workers and however often the
run was interrupted. Only what a language model answered is taken from the record.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from json import dumps, loads
from typing import Any

import numpy as np

from evomerge.campaign.course import Course
from evomerge.campaign.plan import Findings, Plan, make_plan
from evomerge.campaign.stages import make_stages
from evomerge.errors import EvoMergeError, RunError
from evomerge.front.front import observe
from evomerge.proposers.llm import Llm
from evomerge.proposers.proposer import Proposer, proposing
from evomerge.records import Candidate, Objective, Trial, as_it_went
from evomerge.run.run import Run
from evomerge.space.space import Dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where a proposal departs from the record: at which trial, in what, and what it is there and here.

    what: a dimension of the point, or where in the descent or the memo; None on a side that has nothing there.
    """

    trial: int
    what: str
    recorded: Any
    proposed: Any

    @property
    def gap(self) -> float | None:
        """By how much two numbers differ (those of a point in [0, 1], whatever the range of the dimension)."""
        if isinstance(self.recorded, int | float) and isinstance(self.proposed, int | float):
            return abs(self.proposed - self.recorded)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReplay:
    """What came of one stage: how many proposals its record holds, and the first that is another now."""

    stage: int
    proposer: str
    num_proposals: int
    difference: Difference | None


@proposing()
def replay(run: Run, progress: Callable[[int, int], None] = lambda _done, _total: None) -> list[StageReplay]:
    """Propose all trials of a run again, and return each stage's first difference; a stage is left where it differs.

    It takes the checkpoints' headers and the evaluator's items, but no weights. progress is told how many of how many
    proposals are done. Raises: RunError if the record does not hold what is needed; InputError as for any campaign.
    """
    trials = run.trials
    plan = _plan_as_found(run)
    stages = make_stages(run.campaign, plan)
    course = Course(run.campaign, plan, [stage.changes for stage in stages])
    replays, num_done = [], 0
    for number, stage in enumerate(stages):
        own = [trial for trial in trials if trial.stage == number]
        if not own:
            continue
        leg = course.leg(number, trials)
        proposer = stage.make_proposer(leg.problem((run.campaign.seed, number), run.searched))
        if isinstance(proposer, Llm):
            proposer.answer_from(trial.candidate for trial in own)
        difference = None
        for done, (trial, proposed) in enumerate(_proposed_again(proposer, own, run.objectives)):
            progress(num_done + done, len(trials))
            difference = _difference(trial, proposed, leg.plan.space.dimensions)
            if difference:
                break
        replays.append(
            StageReplay(stage=number, proposer=stage.proposer, num_proposals=len(own), difference=difference)
        )
        num_done += len(own)
    progress(len(trials), len(trials))
    return replays


def require_same_proposals(replays: Sequence[StageReplay]) -> None:
    """Raise EvoMergeError if a stage's proposals are not those of the record."""
    if any(stage.difference for stage in replays):
        raise EvoMergeError(
            "the proposals are not those of the record: it was changed, or another version or machine proposes "
            "otherwise; replay it with the packages and on the kind of machine of the run"
        )


def _plan_as_found(run: Run) -> Plan:
    """Return the run's plan with what its workers had found when it began."""
    facts = run.facts
    if "losses" not in facts:
        raise RunError(
            f"{run.location} was begun by an earlier evomerge, whose record does not say what the workers had found; "
            "it cannot be replayed, but everything else can be done with it"
        )
    sums = {measure: np.array(sums_KS) for measure, sums_KS in facts["sums"].items()}
    findings = Findings(hashes=facts["hashes"], items=facts["items"], sums=sums, losses=frozenset(facts["losses"]))
    return make_plan(run.campaign).with_findings(findings)


def _proposed_again(
    proposer: Proposer, trials: Sequence[Trial], objectives: Sequence[Objective]
) -> Iterator[tuple[Trial, Candidate | None]]:
    """Yield each trial of a stage with what the proposer proposes in its place, None if that is nothing.

    It goes on as if that were the same. Raises: RunError if a result comes before its proposal.
    """
    pending: dict[int, Candidate] = {}
    for trial, is_told in as_it_went(trials):
        if is_told:
            if pending.pop(trial.number, None) is None:
                raise RunError(
                    f"trial {trial.number}: expected its result after its proposal, found it before; the ledger is not "
                    "as a driver wrote it"
                )
            proposer.tell(observe(trial, objectives))
        else:
            asked = proposer.ask(1, list(pending.values()))
            yield trial, asked[0] if asked else None
            pending[trial.number] = trial.candidate


def _difference(trial: Trial, proposed: Candidate | None, dimensions: Sequence[Dimension]) -> Difference | None:
    """Return the first thing in which a candidate is not the trial's."""
    recorded, again = _parts(trial.candidate, dimensions), _parts(proposed, dimensions) if proposed else {}
    for what in recorded | again:
        if what not in recorded or what not in again or recorded[what] != again[what]:
            return Difference(trial=trial.number, what=what, recorded=recorded.get(what), proposed=again.get(what))
    return None


def _parts(candidate: Candidate, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """Return what a candidate is made of as JSON's plain values, by name, its point first."""
    data = loads(dumps(asdict(candidate)))  # as it comes out of the ledger
    parts = {dimension.name: x for dimension, x in zip(dimensions, data.pop("point"), strict=True)}
    parts.update(_leaves(data))
    return parts


def _leaves(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if not inside:
        yield name, data
    for key, value in inside:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))
