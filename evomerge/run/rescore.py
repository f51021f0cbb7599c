"""A model of a run on tasks that its campaign did not have, to see what the merge forgot.

All items are scored, none is split off: nobody picks by these numbers, and nothing of them enters the record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evomerge.campaign.campaign import read_tasks
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.references import reference_recipes
from evomerge.evidence.pairs import Pair, paired
from evomerge.evidence.summary import Summarizer, all_sources
from evomerge.records import Items, Measurement, Objective, Trial
from evomerge.run.rebuild import recipe_of, require_tested
from evomerge.run.run import Run, require_same_inputs
from evomerge.scorer.scorer import Scorer
from evomerge.splits import TaskSplits


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """Models on further tasks, by subject: base, experts, uniform average, the best scalar if known, and the trial.

    best_experts: objective -> the expert that is best in it; pairs: the trial beside it.
    """

    trial: Trial
    objectives: tuple[Objective, ...]
    num_items: Mapping[str, int]
    measured: Mapping[str, Measurement]
    best_experts: Mapping[str, str]
    pairs: list[Pair]


def rescore(
    run: Run,
    trial: Trial,
    tasks: Path,
    loading: Callable[[str], None] = lambda _: None,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> Rescored:
    """Score a trial's model and the reference models on every item of a file's tasks.

    tasks: a YAML file with ``evaluation`` and ``objectives`` as in a campaign. advance is told how many of how many
    models are done. Raises: CampaignError for the file; RunError if the checkpoints changed; EvoMergeError if the
    tensors are not those that were tested.
    """
    plan = _with_all_items(make_plan(read_tasks(tasks, run.campaign)))
    recipe = recipe_of(run, trial, replace(plan, objectives=run.objectives))
    references = reference_recipes(plan)
    kept = ["base", *(f"expert:{name}" for name in plan.experts), "uniform", *([run.best_scalar] if run.tested else [])]
    subject = f"trial:{trial.number}"
    recipes = {**{name: references[name] for name in kept}, subject: recipe}
    scorer = Scorer(plan, loading)
    require_same_inputs(run, scorer.findings.hashes, run.facts["items"])
    measured = {}
    for number, (name, of_name) in enumerate(recipes.items()):
        advance(number, len(recipes))
        measured[name] = scorer.score(of_name, "test")
    advance(len(recipes), len(recipes))
    require_tested(run, trial, measured[subject].weights)
    sources = all_sources(plan.objectives, plan.sources("test"))
    measured = Summarizer(plan.objectives, sources, measured).add_to_all(measured)
    best = {objective.name: _best_expert(plan, objective, measured) for objective in plan.objectives}
    pairs = [
        paired(measured[subject], measured[best[objective.name]], [objective], sources)[0]
        for objective in plan.objectives
    ]
    num_items = {task: len(splits["test"]) for task, splits in plan.splits.items()}
    return Rescored(
        trial=trial,
        objectives=plan.objectives,
        num_items=num_items,
        measured=measured,
        best_experts=best,
        pairs=pairs,
    )


def _with_all_items(plan: Plan) -> Plan:
    """Return the plan with every item in each split: these items neither steer nor train."""
    none: Items = np.arange(0)
    splits: TaskSplits = {}
    for task, sources in plan.evaluator.sources.items():
        everything: Items = np.arange(len(sources))
        splits[task] = {"adapt": none, "search": everything, "test": everything}
    return replace(plan, splits=splits)


def _best_expert(plan: Plan, objective: Objective, measured: Mapping[str, Measurement]) -> str:
    experts = [f"expert:{name}" for name in plan.experts]
    return max(experts, key=lambda subject: objective.sign * measured[subject].scores[objective.name].value)
