"""What a race saves: items scored for the same hypervolume on test items, over ten draws of splits and item orders.

    make bench-racing

NSGA-II proposes a stream of candidates, each of which is scored once on all items of the family. Ten times the items
are split into search and test halves, and the stream is raced again from its stored scores, which is exact: a
candidate's scores on some items are a part of its scores on all. Then whole searches run with and without a race, in
which the search is told estimates of stopped candidates; they are fewer, because they cost what they cost.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evomerge.campaign.assemble import PROPOSERS
from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.references import reference_recipes
from evomerge.campaign.sections import BudgetSection, StageSection
from evomerge.errors import CampaignError
from evomerge.evidence.scores import score_of
from evomerge.families.family import make
from evomerge.fidelity.race import Race, RaceOptions
from evomerge.front.front import maximized
from evomerge.front.pareto import hypervolume, non_dominated
from evomerge.proposers.proposer import Problem
from evomerge.records import Floats, Measurement, Observation, TaskItems
from evomerge.run.search import search
from evomerge.scorer.scorer import Scorer
from evomerge.splits import split_items

NUM_CANDIDATES = {"digits4": 160, "text": 60}
NUM_SEEDS = 10
NUM_IRT_SEEDS = 3  # its fits take seconds each
NUM_SEARCHES = {"digits4": 2, "text": 0}
SHARES = {"adapt": 0.0, "search": 0.5, "test": 0.5}
OPTIONS = {
    "default": RaceOptions(),
    "gain: 0": RaceOptions(gain=0),
    "gain: 0.002": RaceOptions(gain=0.002),
    "above: worst": RaceOptions(above="worst"),
    "estimator: irt": RaceOptions(estimator="irt"),
}
console = Console(highlight=False, width=130)


@dataclass(frozen=True)
class Stream:
    """Candidates in the order of a search, and the reference models, all scored on all items."""

    plan: Plan
    references: Mapping[str, Measurement]
    candidates: tuple[Measurement, ...]

    def on(self, measurement: Measurement, items: TaskItems) -> Measurement:
        """What a model scores on some of the items."""
        scores = {
            objective.name: score_of(
                measurement.scores[objective.name].items[items[objective.task]],
                items[objective.task],
                [self.plan.item_sources[objective.task][item] for item in items[objective.task]],
            )
            for objective in self.plan.measured
        }
        return replace(measurement, scores=scores)


@dataclass(frozen=True)
class Replay:
    """One race: cost of all candidates beside that of scoring them whole, and both fronts' hypervolumes."""

    saving: float
    kept: Mapping[str, float]
    """Reference point -> share of the hypervolume that the raced front keeps, NaN where there is none."""
    num_stopped: int
    errors: Mapping[str, float]
    """Estimator -> root mean square of its errors for stopped candidates, in standard deviations of the objective."""


def make_stream(campaign: Campaign, num_candidates: int) -> Stream:
    """Let NSGA-II propose, told the scores on all items."""
    plan = make_plan(campaign)
    scorer, everything = Scorer(plan), {task: np.arange(len(of)) for task, of in plan.evaluator.sources.items()}
    references = {name: scorer.score(recipe, "search", everything) for name, recipe in reference_recipes(plan).items()}
    proposer_type = PROPOSERS["nsga2"]
    problem = Problem(dimensions=plan.space.dimensions, num_objectives=len(plan.objectives), seed=(0, 0))
    proposer = proposer_type(problem, proposer_type.options_type())
    candidates: list[Measurement] = []
    while len(candidates) < num_candidates:
        (candidate,) = proposer.ask(1, [])
        measurement = scorer.score(candidate, "search", everything)
        values_M = maximized(measurement, plan.objectives)
        proposer.tell(Observation(index=len(candidates), point=np.array(candidate.point), values_M=values_M))
        candidates.append(measurement)
        print(f"\r{campaign.name}: {len(candidates)} of {num_candidates} candidates", end="", file=sys.stderr)
    print(file=sys.stderr)
    return Stream(plan, references, tuple(candidates))


def replay(stream: Stream, options: RaceOptions, seed: int) -> Replay:
    """Race the stream on one draw of splits."""
    plan = stream.plan
    splits = split_items(plan.evaluator.sources, SHARES, seed)
    items = {task: of["search"] for task, of in splits.items()}
    sources = {task: [plan.item_sources[task][item] for item in of] for task, of in items.items()}
    references = {name: stream.on(measurement, items) for name, measurement in stream.references.items()}
    searched = [stream.on(measurement, items) for measurement in stream.candidates]
    tested = [
        stream.on(measurement, {task: of["test"] for task, of in splits.items()}) for measurement in stream.candidates
    ]
    race = Race(options, plan.objectives, items, sources, references, seed)
    finished, kept, cost = dict(references), [], 0.0
    misses: dict[str, list[float]] = {"estimate": [], "first items alone": []}
    spread = {
        name: float(np.std([measurement.scores[name].value for measurement in searched])) for name in searched[0].scores
    }
    for number, measurement in enumerate(searched):
        for round_ in range(1, len(race.rounds.added)):
            partial = race.rounds.beginning(measurement, plan.measured, round_)
            estimate = race.estimate(partial, finished)
            if race.verdict(estimate, finished):
                cost += race.rounds.share(round_)
                for name, score in measurement.scores.items():
                    for kind, guess in (("estimate", estimate), ("first items alone", partial)):
                        misses[kind].append((guess.scores[name].value - score.value) / spread[name])
                break
        else:
            cost += 1
            kept.append(number)
            finished[f"trial:{number}"] = measurement
    return Replay(
        saving=len(searched) / cost,
        kept={
            name: _volume(stream, searched, tested, kept, point_M) / (whole or np.nan)
            for name, point_M in _reference_points(stream, {task: of["test"] for task, of in splits.items()}).items()
            for whole in [_volume(stream, searched, tested, range(len(searched)), point_M)]
        },
        num_stopped=len(searched) - len(kept),
        errors={kind: float(np.sqrt(np.mean(np.square(of)))) if of else np.nan for kind, of in misses.items()},
    )


def _reference_points(stream: Stream, items: TaskItems) -> dict[str, Floats]:
    """Return the base's test values, and in each objective the worst of base and experts."""
    objectives, models = stream.plan.objectives, stream.references
    values = {
        name: maximized(stream.on(models[name], items), objectives)
        for name in models
        if name == "base" or name.startswith("expert")
    }
    return {"base": values["base"], "worst": np.min(list(values.values()), axis=0)}


def _volume(
    stream: Stream,
    searched: Sequence[Measurement],
    tested: Sequence[Measurement],
    kept: Sequence[int],
    point_M: Floats,
) -> float:
    """Hypervolume of the test values of the front that is chosen on search values."""
    objectives = stream.plan.objectives
    values_NM = np.array([maximized(searched[number], objectives) for number in kept])
    front = np.flatnonzero(non_dominated(values_NM))
    return hypervolume(np.array([maximized(tested[kept[place]], objectives) for place in front]), point_M)


def show(name: str, stream: Stream) -> None:
    """Print a row an option: medians over the draws, and their range.

    kept: share of the test hypervolume above the base, and above the worst of base and experts an objective; error:
    of the estimates of stopped candidates, in standard deviations of the objective; plain: of their first items' mean.
    """
    table = Table(title=f"{name}: {len(stream.candidates)} candidates, {NUM_SEEDS} draws", box=SIMPLE_HEAD)
    for column in ("race", "saving in items", "kept above base", "kept above worst", "stopped", "error", "plain error"):
        table.add_column(column, justify="left" if column == "race" else "right")
    for label, options in OPTIONS.items():
        try:
            num_seeds = NUM_IRT_SEEDS if options.estimator == "irt" else NUM_SEEDS
            replays = [replay(stream, options, seed) for seed in range(num_seeds)]
        except CampaignError as error:
            table.add_row(label, f"refused: {error}"[:60])
            continue
        table.add_row(
            label,
            _spread([one.saving for one in replays], "x"),
            *(_spread([100 * one.kept[point] for one in replays], " %") for point in ("base", "worst")),
            f"{statistics.median(one.num_stopped for one in replays):.0f}",
            *(f"{statistics.median(one.errors[kind] for one in replays):.2f}" for kind in replays[0].errors),
        )
    console.print(table)


def _spread(values: list[float], unit: str) -> str:
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "none there"
    return f"{statistics.median(values):.1f}{unit} ({min(values):.1f} to {max(values):.1f})"


def show_searches(name: str, campaign: Campaign) -> None:
    """Print whole searches, with and without a race: the search is told estimates of what was stopped."""
    table = Table(title=f"{name}: whole searches by nsga2, {NUM_CANDIDATES[name]} candidates", box=SIMPLE_HEAD)
    for column in ("seed", "cost without", "hypervolume", "cost with a race", "hypervolume"):
        table.add_column(column, justify="right")
    for seed in range(NUM_SEARCHES[name]):
        row = [str(seed)]
        for fidelity in (None, RaceOptions()):
            update = {
                "seed": seed,
                "fidelity": fidelity,
                "search": [StageSection(proposer="nsga2")],
                "budget": BudgetSection(evaluations=NUM_CANDIDATES[name]),
            }
            with tempfile.TemporaryDirectory() as folder:
                run = search(campaign.model_copy(update=update), Path(folder) / "run")
                tests_FM = np.array(
                    [maximized(run.tested[f"trial:{trial.number}"], run.objectives) for trial in run.front]
                )
                volume = hypervolume(tests_FM, maximized(run.tested["base"], run.objectives))
                row += [f"{run.cost:.0f}", f"{1e4 * volume:.2f}e-4"]
        table.add_row(*row)
    if table.row_count:
        console.print(table)


def main() -> None:
    """Make the families (those named on the command line, or all), and print both tables of each."""
    for name in sys.argv[1:] or NUM_CANDIDATES:
        num_candidates = NUM_CANDIDATES[name]
        family = make(name, Path(".cache/families") / name)
        campaign = read_campaign(family.campaign)
        show(name, make_stream(campaign, num_candidates))
        show_searches(name, campaign)


if __name__ == "__main__":
    main()
