"""Compare searchers at equal cost.

    python -m benchmarks.search digits4,concave --searchers auto,nsga2,tpe,cma_es,sobol --seeds 10 --budget 200

Finished runs are kept in --out and never run again, so that a comparison that was interrupted goes on, and one more
searcher costs its own runs alone.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.search.analytic import ANALYTIC
from benchmarks.search.comparison import Comparison, ReferenceName, compare
from benchmarks.search.families import FamilyProblem
from benchmarks.search.picture import write_picture
from benchmarks.search.problem import Opened, Problem
from benchmarks.search.searchers import Section, read_searchers
from benchmarks.search.store import Task
from benchmarks.search.tables import tables
from benchmarks.search.trace import Trace, run
from evomerge.campaign.stages import make_stages
from evomerge.errors import CampaignError, EvoMergeError, did_you_mean
from evomerge.families.family import FAMILIES

SEARCHERS = "auto,nsga2,tpe,cma_es,sobol"
WIDTH = 150  # of the tables


def main() -> None:
    """Run what is missing, then print the tables and draw the picture."""
    asked = _arguments()
    try:
        problems, searchers = read_problems(asked.problems), read_searchers(asked.searchers)
        tasks = [
            task for problem in problems for task in make_tasks(problem, searchers, range(asked.seeds), asked.budget)
        ]
        run_missing(tasks, asked.out, asked.again)
        found = [_compare(problem, tasks, asked) for problem in problems]
    except EvoMergeError as error:
        sys.exit(f"benchmarks.search: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks.search: stopped; the same command goes on where this one ended")
    console = Console(highlight=False, width=WIDTH)
    for one in found:
        console.print(tables(one))
    picture = asked.out / f"{'+'.join(problem.name.replace(':', '-') for problem in problems)}.html"
    write_picture(found, picture)
    console.print(f"picture: {picture}")


def read_problems(text: str) -> list[Problem]:
    """Return the problems of a comma-separated list. Raises: CampaignError for an unknown name."""
    problems: list[Problem] = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name in ANALYTIC:
            problems.append(ANALYTIC[name])
        elif name.split(":")[0] in FAMILIES:
            problems.append(FamilyProblem(name))
        else:
            hint = did_you_mean(name, [*FAMILIES, *ANALYTIC])
            raise CampaignError(f"unknown problem {name!r}{hint}")
    return problems


def make_tasks(problem: Problem, searchers: dict[str, Section], seeds: Sequence[int], budget: int) -> list[Task]:
    """Return the runs of all searchers, seed by seed, so that an early look compares the same seeds."""
    tasks = []
    for seed in seeds:
        plan = problem.plan(seed)
        for label, section in searchers.items():
            stages = make_stages(problem.campaign(section, budget, seed), plan)
            tasks.append(Task(problem, label, stages, seed, budget))
    return tasks


def run_missing(tasks: Sequence[Task], folder: Path, again: bool) -> None:
    """Run the tasks that are not finished, or all of them again; say how far it is and how long it may take."""
    missing = [task for task in tasks if again or not task.path(folder).exists()]
    started, done, total = time.monotonic(), 0.0, sum(task.budget for task in missing)
    opened: tuple[Problem, int, Opened] | None = None
    for number, task in enumerate(missing, start=1):
        if task.path(folder).exists() and not again:  # another process was faster
            continue
        if opened is None or opened[:2] != (task.problem, task.seed):
            opened = (task.problem, task.seed, task.problem.open(task.seed))

        def tick(cost: float, task: Task = task, number: int = number, done: float = done) -> None:
            spent = done + min(cost, task.budget)
            left_s = (time.monotonic() - started) / spent * (total - spent)
            print(
                f"\r{task.problem.name}, {task.searcher}, seed {task.seed}: {cost:.0f} of {task.budget}; "
                f"run {number} of {len(missing)}, {left_s / 60:.0f} min left\033[K",
                end="" if sys.stderr.isatty() or cost < task.budget else "\n",
                file=sys.stderr,
                flush=True,
            )

        task.save(folder, run(opened[2], task.stages, task.seed, task.budget, tick))
        done += task.budget
    if missing and sys.stderr.isatty():
        print(file=sys.stderr)


def _compare(problem: Problem, tasks: Sequence[Task], asked: argparse.Namespace) -> Comparison:
    traces: dict[str, list[Trace]] = {}
    for task in tasks:
        trace = task.load(asked.out) if task.problem is problem else None
        if trace:
            traces.setdefault(task.searcher, []).append(trace)
    plan = problem.plan(0)
    reference = asked.reference
    if reference is None:
        reference = "zero" if all(objective.direction == "max" for objective in plan.objectives) else "base"
    return compare(problem.name, len(plan.space), traces, reference, asked.budget, problem.front)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.splitlines()[0])
    parser.add_argument(
        "problems",
        nargs="?",
        default="digits4",
        help=f"comma-separated: families ({', '.join(FAMILIES)}), which take variants (digits4:2 for two objectives, "
        f"digits4:model for one coefficient an expert), and {', '.join(ANALYTIC)}",
    )
    parser.add_argument("--searchers", default=SEARCHERS, help="proposers, auto, peers, name=stages.yaml, name=[...]")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds")
    parser.add_argument("--budget", type=int, default=200, help="in full-evaluation equivalents")
    parser.add_argument("--out", type=Path, default=Path(".cache/search"), help="folder of finished runs")
    parser.add_argument("--again", action="store_true", help="run what is finished, too")
    parser.add_argument(
        "--reference",
        choices=get_args(ReferenceName),
        help="where hypervolume begins: zero, the base's scores, or the worst of base and experts in each objective "
        "(default: zero where all metrics are maximized, else base)",
    )
    asked = parser.parse_args()
    if asked.seeds < 1 or asked.budget < 1 or not asked.problems.strip(" ,") or not asked.searchers.strip(" ,"):
        parser.error("expected at least one problem, one searcher, one seed and a budget of 1")
    return asked


if __name__ == "__main__":
    main()
