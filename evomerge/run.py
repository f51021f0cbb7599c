"""A run: one campaign's folder, opened, started or resumed, and picked from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from evomerge.campaign import Campaign, DataFlowSection, SpaceChanges
from evomerge.errors import RunError, did_you_mean
from evomerge.evidence.compare import paired_difference
from evomerge.evidence.summary import Summarizer, all_sources
from evomerge.front.front import front_hypervolume, front_of, maximized
from evomerge.front.pick import knee, prefer
from evomerge.ledger.ledger import Ledger
from evomerge.records import Measurement, Objective, Split, Trial
from evomerge.space.choice import chosen
from evomerge.space.data_flow import layers_on

if TYPE_CHECKING:
    from evomerge.driver import Watcher
    from evomerge.plan import Findings, Plan
    from evomerge.stages import Stage


@dataclass(frozen=True)
class Run:
    """What a run holds, read from its ledger; a campaign may be driving it meanwhile."""

    folder: Path
    campaign: Campaign
    objectives: tuple[Objective, ...]
    facts: Mapping[str, Any]
    ledger: Ledger

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials so far, in the order of issue."""
        return [
            replace(trial, measurement=self.searched.get(f"trial:{trial.number}")) for trial in self.ledger.trials()
        ]

    @cached_property
    def searched(self) -> dict[str, Measurement]:
        """Subject (``trial:N`` or a reference model) -> measurement on search items; empty until all references are."""
        return self._measurements("search")

    @cached_property
    def tested(self) -> dict[str, Measurement]:
        """Subject -> measurement on test items; empty until the search has ended."""
        return self._measurements("test")

    def _measurements(self, split: Split) -> dict[str, Measurement]:
        measured = self.ledger.measurements(split)
        if not all(f"expert:{expert}" in measured for expert in self.campaign.experts):
            return {}
        return Summarizer(self.objectives, self.sources(split), measured).add_to_all(measured)

    def sources(self, split: Split) -> dict[str, list[int | str]]:
        """Objective -> the sources of its items of a split."""
        sources: dict[str, list[int | str]] = self.facts["sources"][split]
        return sources

    @property
    def steering(self) -> list[Objective]:
        """The objectives that steer; the others are parts of summaries among them."""
        return [objective for objective in self.objectives if objective.steers]

    @cached_property
    def front(self) -> list[Trial]:
        """The front on search values."""
        return front_of(self.trials, self.objectives)

    @property
    def is_finished(self) -> bool:
        """Whether no stage has anything left to ask within the budget, and the front is scored on the test items.

        A search may end with budget left: a grid has its last point, or the stages take less than the whole.
        """
        return bool(self.facts.get("finished", 0) >= self.campaign.budget.evaluations)

    @property
    def stopped(self) -> list[Trial]:
        """Trials that a race stopped before all search items were scored."""
        return [trial for trial in self.trials if trial.measurement and trial.measurement.stopped]

    @property
    def cost(self) -> float:
        """Full-evaluation equivalents of all trials."""
        return sum(trial.measurement.cost for trial in self.trials if trial.measurement)

    @property
    def has_one_metric(self) -> bool:
        """Whether all objectives are of one metric, so that their mean says something."""
        return len({objective.measure for objective in self.steering}) == 1

    @property
    def references(self) -> list[str]:
        """The reference models that were scored on the test items: base, experts, uniform, the best scalar."""
        return [subject for subject in self.tested if not subject.startswith("trial:")]

    @property
    def best_scalar(self) -> str:
        """Name of the best single-scalar task arithmetic, chosen on search items."""
        return next(subject for subject in self.references if subject.startswith("scalar:"))

    def gain(self, subject: str, over: str) -> tuple[float, float]:
        """Return the paired difference of two subjects' mean test scores over objectives, and its standard error."""
        return paired_difference(self.tested[subject], self.tested[over], self.steering, self.sources("test"))

    @property
    def has_choice(self) -> bool:
        """Whether the operator was searched too."""
        return len(self.campaign.operator_names) > 1

    def operator_of(self, trial: Trial) -> str:
        """Name of the operator that a trial chose."""
        names = self.campaign.operator_names
        return names[chosen(trial.point, len(names))]

    def label(self, trial: Trial) -> str:
        """How a trial is shown: by its number, and its operator where there was a choice."""
        return f"trial {trial.number}" + (f" by {self.operator_of(trial)}" if self.has_choice else "")

    @property
    def changes(self) -> list[SpaceChanges]:
        """How the space of each stage that has begun differs from the campaign's."""
        return [SpaceChanges.model_validate(stage["changes"]) for stage in self._stages]

    @property
    def dimensions(self) -> str:
        """How many numbers were searched, such as ``16``, or ``2, then 16`` where stages differ."""
        counts = [str(len(stage["space"])) for stage in self._stages]
        return ", then ".join(counts if len(set(counts)) > 1 else counts[:1])

    @property
    def lineage(self) -> list[str]:
        """Say of each stage with a space of its own which trial it started from, and which experts it left out."""
        sentences = []
        for number, stage in enumerate(self._stages):
            if stage.get("ancestor") is not None and SpaceChanges.model_validate(stage["changes"]) != SpaceChanges():
                without = f", without {' and '.join(stage['left_out'])}" if stage["left_out"] else ""
                start = f"started from trial {stage['ancestor']}"
                sentences.append(f"stage {number + 1} searched {len(stage['space'])} numbers and {start}{without}")
        return sentences

    @property
    def _stages(self) -> list[Mapping[str, Any]]:
        """What is noted of each stage that has begun; those of older runs share the campaign's space."""
        if "stages" in self.facts:
            return list(self.facts["stages"])
        shared = {"changes": {}, "left_out": [], **self.facts}
        return [shared] * (1 + max((trial.stage for trial in self.trials), default=-1))

    def numbers_of(self, trial: Trial) -> list[tuple[Mapping[str, Any], float]]:
        """Return the dimensions of a trial's operator (as ``asdict`` gives them), each with its number.

        Of a path's layers, whether they are on (0 or 1), and the scales of those that are. What its stage kept from an
        earlier one stands among them.
        """
        stage, point = self._stages[trial.stage], trial.point
        if self.has_choice:
            stage = stage["choice"][self.operator_of(trial)]
            point = tuple(point[column] for column in stage["columns"])
        numbers = [
            (dimension, dimension["low"] + x * (dimension["high"] - dimension["low"]))
            for dimension, x in zip(stage["space"], point, strict=True)
        ]
        if isinstance(self.campaign.space, DataFlowSection):
            num_places = sum(dimension["is_binary"] for dimension in stage["space"])
            on = layers_on(point[:num_places], self.campaign.space.max_layers).tolist()
            switches = [(dimension, float(t in on)) for t, dimension in enumerate(stage["space"][:num_places])]
            scales = numbers[num_places:]
            return [*switches, *(scales[t] for t in on if scales)]
        return numbers + [(kept, kept["number"]) for kept in stage.get("kept", ())]

    def hypervolume(self) -> float:
        """Of the front's search values above the base's."""
        return front_hypervolume(self.trials, self.objectives, self.searched["base"])

    def pick(
        self, *, trial: int | None = None, at_knee: bool = False, preference: Mapping[str, float] | None = None
    ) -> Trial:
        """Return one trial: by number, the front's knee, or the member that serves a preference best.

        A preference weighs objectives; one that it leaves out counts 1. Picking uses search values.
        Raises: RunError if there is no such trial, it failed, or the front is empty.
        """
        if (trial is not None) + at_knee + (preference is not None) != 1:
            raise RunError("pick one model: --trial N, --knee, or --prefer NAME=WEIGHT,...")
        if trial is not None:
            return self._trial(trial)
        if not self.front:
            raise RunError(
                f"{self.folder}: no trial has finished within the floors and ceilings; there is no front yet"
            )
        values_NM = np.array(
            [maximized(member.measurement, self.objectives) for member in self.front if member.measurement]
        )
        if at_knee:
            return self.front[knee(values_NM)]
        assert preference is not None
        names = [objective.name for objective in self.steering]
        for name, weight in preference.items():
            if name not in names:
                raise RunError(f"--prefer: no objective {name!r}{did_you_mean(name, names)}")
            if not (np.isfinite(weight) and weight >= 0):
                raise RunError(f"--prefer: {name}: expected a weight of 0 or more, found {weight:g}")
        weights_M = np.array([preference.get(name, 1.0) for name in names])
        if not weights_M.any():
            raise RunError("--prefer: all weights are 0; give at least one objective a positive weight")
        return self.front[prefer(values_NM, weights_M)]

    def _trial(self, number: int) -> Trial:
        if not 0 <= number < len(self.trials):
            raise RunError(f"{self.folder}: no trial {number}; there are trials 0 to {len(self.trials) - 1}")
        found = self.trials[number]
        if found.measurement is None:
            raise RunError(f"trial {number} has no scores: {found.failure or 'it has not finished'}; pick another")
        return found


def open_run(location: str | Path) -> Run:
    """Open a run by its folder, or by its name under runs/. Raises: RunError."""
    folder = Path(location)
    if not Ledger.exists(folder) and Ledger.exists(Path("runs") / folder):
        folder = Path("runs") / folder
    ledger = Ledger.open(folder)
    facts = ledger.facts()
    objectives = tuple(
        Objective(**{**objective, "parts": tuple(objective["parts"])}) for objective in facts["objectives"]
    )
    campaign = Campaign.model_validate(ledger.campaign(), strict=False)
    return Run(folder, campaign, objectives, facts, ledger)


class Unwatched:
    """A watcher that shows nothing."""

    def begin(self, stages: "Sequence[Stage]") -> None:
        """Nothing to show."""

    def phase(self, title: str, total: int, done: int) -> None:
        """Nothing to show."""

    def advance(self, trial: Trial | None) -> None:
        """Nothing to show."""

    def note(self, line: str) -> None:
        """Nothing to show."""


def search(
    campaign: Campaign,
    folder: str | Path,
    *,
    watcher: "Watcher | None" = None,
) -> Run:
    """Start the campaign's run in ``folder``, resume it, or find it finished; return it finished.

    Raises: RunError if the folder holds another campaign's run, or another process drives it.
    """
    from evomerge.course import Course
    from evomerge.draining import Draining
    from evomerge.driver import Driver
    from evomerge.plan import make_plan
    from evomerge.pools import open_pool
    from evomerge.stages import make_stages

    folder = Path(folder)
    with _driving(folder):
        started = Ledger.exists(folder)
        if started:
            run = open_run(folder)
            _require_same_meaning(run, campaign)
            if run.is_finished and campaign.budget.evaluations <= run.campaign.budget.evaluations:
                return run
        plan = make_plan(campaign)
        make_stages(campaign, plan)  # mistakes come to light before the weights are loaded
        watcher = watcher or Unwatched()
        with open_pool(campaign, plan, watcher.note) as (pool, findings):
            plan = plan.with_findings(findings)
            stages = make_stages(campaign, plan)  # with what the workers have found out
            dumped = campaign.model_dump(mode="json")
            if started:
                require_same_inputs(run, findings.hashes, findings.items)
                run.ledger.update_campaign(dumped)
                ledger = run.ledger
            else:
                ledger = Ledger.create(folder, dumped, _facts(plan, findings))
            watcher.begin(stages)
            course = Course(campaign, plan, [stage.changes for stage in stages])
            with Draining(watcher.note) as draining:
                Driver(plan, ledger, pool, findings.hashes, watcher, draining).run(stages, course, campaign.seed)
            ledger.finish(campaign.budget.evaluations)
        ledger.close()
    return open_run(folder)


@contextmanager
def _driving(folder: Path) -> Iterator[None]:
    """Let one process drive a run; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "driver.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"{folder}: another process is driving this run; wait for it, or look on with evomerge front"
        ) from error
    except OSError as error:
        raise RunError(
            f"{folder}: cannot write a run there ({error.strerror}); choose another place with --run"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _facts(plan: "Plan", findings: "Findings") -> dict[str, Any]:
    """What readers of a run need and the campaign file does not say."""
    from evomerge.plan import decisions

    return {
        "objectives": [asdict(objective) for objective in plan.objectives],
        "hashes": findings.hashes,
        "decisions": decisions(plan.experts.values(), plan.dtype),
        "items": findings.items,
        "sources": {split: all_sources(plan.objectives, plan.sources(split)) for split in ("search", "test")},
        "stages": [],
    }


def _require_same_meaning(run: Run, campaign: Campaign) -> None:
    before, now = run.campaign.meaning(), campaign.meaning()
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        raise RunError(
            f"{run.folder} holds a run of a campaign that differs in {', '.join(differing)}; "
            "its scores do not compare: rename this campaign, or give another place with --run"
        )
    if campaign.budget.evaluations < len(run.trials):
        raise RunError(
            f"budget.evaluations: {campaign.budget.evaluations}, but {run.folder} holds {len(run.trials)} trials; "
            "a budget can only grow"
        )


def require_same_inputs(run: Run, hashes: Mapping[str, str], items: str) -> None:
    """Raise RunError if checkpoints or items are no longer those that the run began with."""
    changed = [folder for folder, found in hashes.items() if run.facts["hashes"].get(folder) != found]
    if items != run.facts["items"]:
        changed.append(str(run.campaign.evaluation.get("data", "the evaluation's items")))
    if changed:
        raise RunError(
            f"{changed[0]} has changed since {run.folder} began; its scores do not compare: put it back, or begin "
            "another run with --run"
        )
