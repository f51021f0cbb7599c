"""Orderings that the literature reports, and whether a small family shows them, too.

    make bench-orderings
    python -m benchmarks.orderings adamerging evo_merging --seeds 0 1 2

Each study makes the models of one paper's table from digits4 and scores them on test items; a seed draws what the
method draws, and splits the items anew. A claim is about two models of a table. It is judged by the mean over seeds of
their difference, and agrees or disagrees beyond two standard errors.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.adapters import POOL, TARGET, make_pool
from evomerge.campaign.assemble import PROPOSERS
from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.plan import make_plan
from evomerge.campaign.stages import make_stages
from evomerge.evidence.compare import Difference, paired_difference
from evomerge.evidence.summary import Sources, all_sources
from evomerge.families.family import FamilySummary, make
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Measurement, Objective
from evomerge.run.search import search
from evomerge.scorer.scorer import Scorer

CLEAR = 2.0  # standard errors
TWO = ("rot90", "invert")
COEFFICIENT = {"low": 0.0, "high": 1.0, "start": 0.3}  # of all descents, as in AdaMerging


@dataclass(frozen=True)
class Claim:
    """A model is better than another by more than ``by``, in the mean of the objectives; published: what papers say."""

    better: str
    worse: str
    published: str
    by: float = 0.0

    def verdict(self, difference: Difference) -> str:
        """Say whether a difference shows it."""
        beyond = difference.value - self.by
        if abs(beyond) <= CLEAR * difference.stderr:
            return "undecided"
        return "agrees" if beyond > 0 else "disagrees"


@dataclass(frozen=True)
class Tested:
    """Models on the test items of one seed."""

    objectives: Sequence[Objective]
    sources: Sources
    models: Mapping[str, Measurement]

    def score(self, model: str) -> float:
        """The mean over objectives, in the user's own sign."""
        return float(np.mean([self.models[model].scores[objective.name].value for objective in self.objectives]))

    def difference(self, claim: Claim) -> Difference:
        """Return by how much the model of a claim is better."""
        return paired_difference(self.models[claim.better], self.models[claim.worse], self.objectives, self.sources)


@dataclass(frozen=True)
class Study:
    """One paper's table: what its models score, by the family, the seed and a folder for what seeds share."""

    title: str
    test: Callable[[FamilySummary, int, Path], Tested]
    claims: Sequence[Claim]


def overall(differences: Sequence[Difference]) -> Difference:
    """Return the mean over seeds, with the errors of the items and of the seeds, added in squares.

    Seeds share many test items, so that more of them do not lessen the items' error: it is the mean of theirs, which is
    enough whatever the correlation. The seeds' own is that of their mean; of one seed it is not known, and left out.
    """
    values_S, stderr_S = np.array(differences).T
    of_seeds = values_S.std(ddof=1) / len(values_S) ** 0.5 if len(values_S) > 1 else 0.0
    return Difference(float(values_S.mean()), float(np.hypot(stderr_S.mean(), of_seeds)))


def adamerging(family: FamilySummary, seed: int, folder: Path) -> Tested:  # noqa: ARG001
    """50 steps of Adam at a rate of 1e-2 go as far as the paper's 500 at 1e-3."""
    operators = {
        "task arithmetic": {"name": "task_arithmetic"},
        "TIES": {"name": "ties_paper", "normalize": False},
    }
    runs = {
        "task-wise": ("model", "entropy", "task arithmetic"),
        "layer-wise": ("tensor", "entropy", "task arithmetic"),
        "layer-wise ++": ("tensor", "entropy", "TIES"),
        "task-wise, labels": ("model", "ce", "task arithmetic"),
        "layer-wise, labels": ("tensor", "ce", "task arithmetic"),
    }
    models = {}
    for model, (groups, loss, start) in runs.items():
        options = {"loss": loss, "steps": 50, "learning_rate": 1e-2}
        space = {"groups": groups, "coefficient": COEFFICIENT}
        stage = {"proposer": "adamerging", "options": options}
        campaign = _campaign(family, seed, [stage], operator=operators[start], space=space)
        models[f"start: {start}"], models[model] = _descended(campaign)
    return _tested(campaign, models)


def fw_merging(family: FamilySummary, seed: int, folder: Path) -> Tested:  # noqa: ARG001
    """Two tasks, with their own experts alone and with two that are of no use to them."""
    sections = read_campaign(family.campaign).model_dump()
    models = {}
    for experts, kept in (("their experts", TWO), ("all experts", tuple(sections["experts"]))):
        campaign = _campaign(
            family,
            seed,
            [{"proposer": "fw_merging", "options": {"steps": 20, "factor": 0.3}}],
            experts={name: sections["experts"][name] for name in kept},
            objectives=[section for section in sections["objectives"] if section["name"] in TWO],
            space={"groups": "tensor", "coefficient": COEFFICIENT},
        )
        models[f"task arithmetic, {experts}"], models[f"hard, {experts}"] = _descended(campaign)
    return _tested(campaign, models)


def expert_merging(family: FamilySummary, seed: int, folder: Path) -> Tested:  # noqa: ARG001
    """40 steps on five items a task with the official numbers, and on ten at a lower rate without a penalty.

    Of "++" importance counts coefficients as equal, and each tensor has 1.2 chunks on average.
    """
    gentle = {"samples": 10, "batch_size": 10, "learning_rate": 0.1, "penalty": 0.0}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "AdaMerging": ("adamerging", {"learning_rate": 1e-2}),
        "official numbers": ("expert_merging", {}),
        "gentle": ("expert_merging", gentle),
        "gentle, hidden states": ("expert_merging", {**gentle, "layers": [1, 3, 5]}),
        "gentle ++": ("expert_merging", gentle),
    }
    models = {}
    for model, (proposer, options) in runs.items():
        own = {"experts": {task: task for task in family.experts}} if proposer == "expert_merging" else {}
        operator = {"name": "chunked", "budget": 1.2} if "++" in model else {"name": "task_arithmetic"}
        campaign = _campaign(
            family,
            seed,
            [{"proposer": proposer, "options": {"steps": 40, **own, **options}}],
            operator=operator,
            space={"groups": "tensor", "coefficient": COEFFICIENT},
        )
        models["start: task arithmetic"], models[model] = _descended(campaign)
    return _tested(campaign, models)


def evo_merging(family: FamilySummary, seed: int, folder: Path) -> Tested:
    """180 evaluations for every search, however many stages; the paper has 1200, and all experts at 1 / N at first."""
    pool = folder / "adapters"
    experts = {name: pool / name for name in POOL} if pool.exists() else make_pool(family, pool)
    even, lowest, highest = 1 / len(experts), -1.5, 1.5

    def stage(span: float, **changes: Any) -> dict[str, Any]:
        return {"proposer": "cma_es", "options": {"population": 20, "penalty": 0.05, "sigma": 0.05 / span}, **changes}

    densities = {"density": {"low": 0.0, "high": 1.0, "start": 1.0}}
    denoise = stage(1.0, space={"coefficient": even}, operator=densities)
    denoise_first, best = {**denoise, "evaluations": 60}, {"density": "best"}
    runs: dict[str, tuple[float, list[dict[str, Any]]]] = {
        "both stages": (lowest, [denoise_first, stage(highest - lowest, operator=best)]),
        "no denoising": (lowest, [stage(highest - lowest)]),
        "no scaling": (lowest, [denoise]),
        "no sign flip": (0.0, [denoise_first, stage(highest, operator=best)]),
        "neither": (lowest, [{"proposer": "sobol", "evaluations": 1}]),  # the start
    }
    models = {}
    for model, (low, stages) in runs.items():
        campaign = _campaign(
            family,
            seed,
            stages,
            budget={"evaluations": stages[0]["evaluations"] if model == "neither" else 180},
            experts={name: str(path) for name, path in experts.items()},
            operator={"name": "lora", "combination": "evo_merging", "density": 1.0},
            space={"groups": "model", "coefficient": {"low": low, "high": highest, "start": even}},
            objectives=[{"name": TARGET, "task": TARGET, "metric": "loss"}],
        )
        models[model] = _searched(campaign)
    return _tested(campaign, models)


STUDIES = {
    "adamerging": Study(
        "AdaMerging, arxiv.org/abs/2310.02575: mean accuracy; entropy descends unless it says labels",
        adamerging,
        (
            Claim("layer-wise", "task-wise", "80.2 over 71.1"),
            Claim("layer-wise, labels", "task-wise, labels", "not in the paper"),
            Claim("task-wise", "start: task arithmetic", "71.1 over 69.1"),
            Claim("layer-wise", "start: task arithmetic", "80.2 over 69.1"),
            Claim("layer-wise, labels", "start: task arithmetic", "not in the paper"),
            Claim("start: TIES", "start: task arithmetic", "72.9 over 69.1"),
            Claim("layer-wise ++", "layer-wise", "81.2 over 80.2"),
        ),
    ),
    "fw_merging": Study(
        "FW-Merging, arxiv.org/abs/2503.12649: mean accuracy of two tasks, experts of two others being irrelevant",
        fw_merging,
        (
            Claim("task arithmetic, their experts", "task arithmetic, all experts", "a plain sum suffers"),
            Claim("hard, all experts", "hard, their experts", "74.2 and 74.1: equal, within .02", by=-0.02),
            Claim("hard, all experts", "task arithmetic, all experts", "80.1 (soft) over 21.2"),
        ),
    ),
    "expert_merging": Study(
        "Expert Merging, arxiv.org/abs/2509.25712: mean accuracy, without labels",
        expert_merging,
        (
            Claim("official numbers", "start: task arithmetic", "58.1 over 56.2"),
            Claim("official numbers", "AdaMerging", "58.1 over 56.9"),
            Claim("gentle", "start: task arithmetic", "58.1 over 56.2"),
            Claim("gentle", "AdaMerging", "58.1 over 56.9"),
            Claim("gentle, hidden states", "gentle", "part of the method"),
            Claim("gentle ++", "gentle", "58.5 over 58.1"),
        ),
    ),
    "evo_merging": Study(
        f"Evo-Merging, arxiv.org/abs/2509.12951: loss of {TARGET}, {len(POOL)} adapters; less is better",
        evo_merging,
        tuple(
            Claim("both stages", without, f"52.1 over {published}")
            for without, published in (
                ("no denoising", 40.9),
                ("no scaling", 24.3),
                ("no sign flip", 40.1),
                ("neither", 20.8),
            )
        ),
    ),
}


def main() -> None:
    """Run the studies and print a table and the verdicts of each."""
    parser = argparse.ArgumentParser(description="Orderings that the literature reports, on digits4.")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="whole numbers (default: 0 1 2)")
    given = parser.parse_args()
    if unknown := set(given.studies) - STUDIES.keys():
        parser.error(f"unknown study {min(unknown)}; expected some of {', '.join(STUDIES)}")
    family = make("digits4", Path(".cache/families/digits4"))
    for name in given.studies or STUDIES:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            tested = {}
            for seed in given.seeds:
                print(f"{name}: seed {seed}", file=sys.stderr)
                tested[seed] = STUDIES[name].test(family, seed, Path(folder))
        show(STUDIES[name], tested, time.process_time() - started)


def show(study: Study, tested: Mapping[int, Tested], cpu_s: float) -> None:
    """Print what every model scores, and what becomes of the claims."""
    console = Console(highlight=False, width=130)
    scores = Table(box=SIMPLE_HEAD)
    scores.add_column("model")
    for seed in tested:
        scores.add_column(f"seed {seed}", justify="right")
    for model in next(iter(tested.values())).models:
        scores.add_row(model, *(f"{one.score(model):.3f}" for one in tested.values()))
    claims = Table(box=SIMPLE_HEAD)
    for column in ("better", "than", "published", "by, paired", "verdict"):
        claims.add_column(column)
    for claim in study.claims:
        difference = overall([one.difference(claim) for one in tested.values()])
        by = f"{difference.value:+.3f} ±{difference.stderr:.3f}"
        claims.add_row(claim.better, claim.worse, claim.published, by, claim.verdict(difference))
    for part in (study.title, scores, claims, f"{cpu_s:.0f} CPU seconds\n"):
        console.print(part)


def _campaign(family: FamilySummary, seed: int, stages: list[dict[str, Any]], **changes: Any) -> Campaign:
    sections = read_campaign(family.campaign).model_dump()
    search = {"search": stages, "budget": {"evaluations": 1}, "seed": seed}
    return Campaign.model_validate({**sections, **search, **changes})


def _descended(campaign: Campaign) -> tuple[Measurement, Measurement]:
    """Return where the first trial of a descent starts and where it ends, on test items."""
    plan = make_plan(campaign)
    (stage,) = make_stages(campaign, plan)
    problem = Problem(
        dimensions=plan.space.dimensions,
        num_objectives=len(plan.steering),
        seed=(campaign.seed, 0),
        tasks=tuple(plan.splits),
        experts=tuple(plan.experts),
    )
    (candidate,) = PROPOSERS[stage.proposer](problem, stage.options).ask(1, [])  # type: ignore[call-arg]
    scorer = Scorer(plan)
    return scorer.score(Candidate(point=candidate.point), "test"), scorer.score(candidate, "test")


def _searched(campaign: Campaign) -> Measurement:
    """Return the trial that is best on search items, on test items."""
    with tempfile.TemporaryDirectory() as folder:
        run = search(campaign, Path(folder) / "run")
        tested = run.tested[f"trial:{run.pick(at_knee=True).number}"]
        run.ledger.close()
    return tested


def _tested(campaign: Campaign, models: Mapping[str, Measurement]) -> Tested:
    plan = make_plan(campaign)
    return Tested(plan.steering, all_sources(plan.objectives, plan.sources("test")), models)


if __name__ == "__main__":
    main()
