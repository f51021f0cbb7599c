"""Other tools' searches with their own settings, as proposers: they are measured and paid for like ours.

PymooNsga2 is the tool itself, in an environment of its own; MergekitEvolve its optimizer, which we have, too, with its
settings; MapPublished our port of a method, with the course that its paper takes.

Shape letters: D dimensions, M objectives, K experts.
"""

import json
import subprocess
import sys
import warnings
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock

from evomerge.errors import CampaignError, EvoMergeError
from evomerge.proposers.generations import Generations
from evomerge.proposers.map import Map, MapOptions
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Floats, Observation, Options

PYMOO = "pymoo==0.6.2"
ENVIRONMENT = Path(".cache/peers/pymoo")
POPULATION = 25  # of Mergenetic's notebooks; the file that comes with its script for several objectives says 1


class PymooNsga2:
    """pymoo's NSGA-II as Mergenetic runs it: pymoo's own operators, a population of 25, duplicates removed.

    Genes are in [0, 1], and all of the first generation is drawn there. It knows neither the space's start nor floors
    and ceilings; a failed candidate is worse than all others of its generation.
    Source: github.com/tommasomncttn/mergenetic, experiments/evolutionary-merging-lm-harness/end2end_multiobjective.py
    and experiments/evolutionary-merging/2.0-multitask-predefined.ipynb; arxiv.org/abs/2505.11427.
    Raises: CampaignError if pymoo cannot be installed.
    """

    name: ClassVar[str] = "pymoo_nsga2"
    options_type: ClassVar[type[Options]] = Options
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: Options) -> None:  # noqa: ARG002  (it has none)
        self._python = install_pymoo(ENVIRONMENT)
        self._settings = {
            "num_dimensions": problem.num_dimensions,
            "num_objectives": problem.num_objectives,
            "population": POPULATION,
            "seed": int(problem.rng(0).integers(2**31)),
        }
        self._points: list[list[float]] = []
        self._told: dict[int, Floats | None] = {}
        self._first_index, self._num_asked = 0, 0

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return what is left of the generation, up to ``n``."""
        if not self._num_asked:
            self._points = self._exchange(self._settings)
        here = self._num_asked - self._first_index
        points = self._points[here : here + n]
        self._num_asked += len(points)
        return [Candidate(point=tuple(point)) for point in points]

    def tell(self, observation: Observation) -> None:
        """Take a result; the last of a generation is answered with the next one."""
        self._told[observation.index] = observation.values_M
        if len(self._told) < len(self._points):
            return
        known = [values_M for values_M in self._told.values() if values_M is not None]
        failed_M = np.min([np.zeros(self._settings["num_objectives"]), *known], axis=0) - 1.0
        values = [self._told[self._first_index + place] for place in range(len(self._points))]
        losses = [-(failed_M if values_M is None else values_M) for values_M in values]
        self._first_index += len(self._points)
        self._told.clear()
        self._points = self._exchange([losses_M.tolist() for losses_M in losses])

    def recall(self, candidate: Candidate) -> None:
        """Ask for the same again: a generation follows from what was told."""
        self.ask(1, [candidate])

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        """Started by the first ask; it ends when the proposer is gone."""
        command = [self._python, "-I", str(Path(__file__).with_name("pymoo_nsga2.py"))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, _end, process)
        return process

    def _exchange(self, message: Any) -> Any:
        """Send a line and return the line that answers it."""
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            print(json.dumps(message), file=pipes.stdin, flush=True)
            return json.loads(pipes.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise EvoMergeError(
                f"pymoo_nsga2: {ENVIRONMENT}'s process ended before it answered (what it said is above); delete "
                f"{ENVIRONMENT}, which is made anew, and run the same command again"
            ) from error


def install_pymoo(folder: Path) -> str:
    """Return the Python of pymoo's environment, which is made if it is not there; wants the package index once.

    Raises: CampaignError if it cannot be made.
    """
    python, finished = folder / "bin" / "python", folder / PYMOO
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another comparison may be making it
        if not finished.exists():
            print(f"installing {PYMOO} into {folder} (a minute, once)", file=sys.stderr)
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PYMOO])
            finished.touch()
    return str(python)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CampaignError(
            f"--searchers: pymoo_nsga2 needs {PYMOO} in {ENVIRONMENT}, which cannot be made here "
            f"({said[-1] if said else f'status {done.returncode}'}); connect to a package index, or leave it out"
        )


def _end(process: subprocess.Popen[str]) -> None:
    """Close its input, at which it ends."""
    process.communicate()


class MergekitEvolve(Generations):
    """CMA-ES of mergekit-evolve: ``cma.fmin2`` with a first step of 1/6 and else pycma's defaults, on the mean score.

    Genes are the numbers themselves and have no bounds. They start at 1 / K where they are an expert's coefficient, and
    at 1 where not; negative ones count as positive, unless the space has negative ones. What is beyond the box, which
    mergekit has not, is scored at its edge. Where pycma would stop, there is nothing left to ask.
    Source: mergekit 0.1.5, mergekit/scripts/evolve.py and mergekit/evo/genome.py. Departure: a seed.
    """

    name: ClassVar[str] = "mergekit_evolve"
    options_type: ClassVar[type[Options]] = Options
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: Options) -> None:  # noqa: ARG002  (it has none)
        super().__init__(problem, _Fmin2(problem), None)


class _Fmin2:
    """pycma's loop in ``fmin2``, turned inside out; its points are of genes as they are scored."""

    def __init__(self, problem: Problem) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like matplotlib, for plots that we do not make
            import cma

        low_D, high_D = np.array([[dimension.low, dimension.high] for dimension in problem.dimensions]).T
        self._low_D, self._span_D, self._is_folded_D = low_D, high_D - low_D, low_D >= 0.0
        weight = 1.0 / max(1, len(problem.searched_experts))
        start_D = np.array([1.0 if owner is None else weight for owner in problem.owners])
        settings = {"randn": self._randn, "seed": np.nan, "verbose": -9}  # no seeding of numpy's global generator
        self._es = cma.CMAEvolutionStrategy(start_D, 1 / 6, settings)
        self._genes: list[Floats] = []

    def ask(self, rng: np.random.Generator) -> list[Floats]:
        """Return a generation, none once it has stopped."""
        self._rng = rng
        self._genes = [] if self._es.stop() else self._es.ask()
        numbers = [np.where(self._is_folded_D, np.abs(genes_D), genes_D) for genes_D in self._genes]
        return [np.clip((numbers_D - self._low_D) / self._span_D, 0.0, 1.0) for numbers_D in numbers]

    def tell(self, points: Sequence[Floats], losses: Sequence[float]) -> None:  # noqa: ARG002
        """Move the distribution by its genes."""
        self._es.tell(self._genes, losses)

    def _randn(self, *shape: int) -> Floats:
        return self._rng.standard_normal(shape)


class MapPublished(Map):
    """MAP in the course of its paper: (K+1)(K+2) points of its law, one fit, then the front that this fit predicts.

    Meant for one number an expert, as the paper has it. Where the authors' code harms itself we do not follow: the fit
    starts from ridge least squares in place of ones, at which the sigmoid saturates, and the front is sought in the box
    instead of [-3, 3]. The other departures of ``evomerge/proposers/map.py`` hold too, but for the number of points and
    refitting. A front that is used up is followed by points around it.
    Source: arxiv.org/abs/2406.07529, github.com/luli-git/MAP.
    """

    name: ClassVar[str] = "map_published"
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, problem: Problem, options: Options) -> None:  # noqa: ARG002  (it has none)
        num_experts = len(problem.searched_experts)
        super().__init__(problem, MapOptions(num_startup=(num_experts + 1) * (num_experts + 2)))

    def tell(self, observation: Observation) -> None:
        """Take a result of the law's points; those of the front are no longer fitted."""
        if observation.index < self.num_startup:
            super().tell(observation)
