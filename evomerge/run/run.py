"""A run: one campaign's record, opened and picked from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.sections import DataFlowSection, SpaceChanges
from evomerge.errors import RunError
from evomerge.evidence.compare import paired_difference
from evomerge.evidence.summary import Summarizer
from evomerge.front.front import Front, front_hypervolume, front_of
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, find_place
from evomerge.operators.passthrough import Passthrough
from evomerge.records import Measurement, Objective, Split, Trial
from evomerge.space.choice import chosen
from evomerge.space.data_flow import layers_on

if TYPE_CHECKING:
    import pandas as pd

    from evomerge.run.rebuild import LiveModel


@dataclass(frozen=True)
class Run:
    """What a run holds, read from its ledger; a campaign may be driving it meanwhile."""

    location: Location
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
    def front(self) -> Front:
        """The front on search values."""
        return Front(tuple(front_of(self.trials, self.objectives)), self.objectives)

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
    def failure_kinds(self) -> dict[str, int]:
        """Kind of failure -> how many trials ended so, most first."""
        return dict(Counter(trial.fate.get("kind", "failed") for trial in self.trials if trial.failure).most_common())

    @property
    def halved(self) -> list[Trial]:
        """Trials that fitted memory, if at all, only in batches of half the size."""
        return [trial for trial in self.trials if trial.fate.get("halved")]

    @property
    def cost(self) -> float:
        """Full-evaluation equivalents of all trials."""
        return sum(trial.measurement.cost for trial in self.trials if trial.measurement)

    @property
    def seconds(self) -> dict[str, float]:
        """Where the workers' time went, in seconds by part, most first: all trials, references and test scores."""
        spent: Counter[str] = Counter()
        for measurement in (*self.searched.values(), *self.tested.values()):
            spent.update(measurement.seconds)
        return dict(spent.most_common())

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
        """Whether trials have several operators: it was searched too, or paths were laid after merging."""
        return len(self.operator_names) > 1

    @property
    def operator_names(self) -> list[str]:
        """Names of the operators that trials may have, paths of layers included."""
        paths = [Passthrough.name] if self.campaign.lays_paths_through_merges else []
        return list(dict.fromkeys([*self.campaign.operator_names, *paths]))

    def data_flow_of(self, trial: Trial) -> DataFlowSection | None:
        """Return the data-flow space of a trial's stage, if it has one."""
        spaces = self.changes[trial.stage].space, self.campaign.space
        return next((space for space in spaces if isinstance(space, DataFlowSection)), None)

    def operator_of(self, trial: Trial) -> str:
        """Name of the operator that a trial chose; that of paths of layers."""
        if self.data_flow_of(trial):
            return Passthrough.name
        names = self.campaign.operator_names
        return names[chosen(trial.point, len(names))]

    def label(self, trial: Trial) -> str:
        """How a trial is shown: by its number, and its operator where there was a choice."""
        return f"trial {trial.number}" + (f" by {self.operator_of(trial)}" if self.has_choice else "")

    @cached_property
    def changes(self) -> list[SpaceChanges]:
        """How the space of each stage that has begun differs from the campaign's."""
        return [SpaceChanges.model_validate(stage["changes"]) for stage in self._stages]

    @property
    def dimensions(self) -> str:
        """How many numbers were searched, such as ``16``, or ``2, then 16`` where stages differ."""
        counts = [str(len(stage["space"])) for stage in self._stages]
        return ", then ".join(counts if len(set(counts)) > 1 else counts[:1])

    def ancestor(self, trial: Trial) -> int | None:
        """Number of the trial that a trial's stage started from; None if it started anew."""
        ancestor: int | None = self._stages[trial.stage].get("ancestor")
        return ancestor

    def proposer_of(self, trial: Trial) -> str:
        """Name of the proposer of a trial's stage; ``auto`` where the campaign left the choice to the search."""
        stages = self.campaign.search
        return stages if isinstance(stages, str) else stages[trial.stage].proposer

    @property
    def lineage(self) -> list[str]:
        """Say of each stage with a space of its own which trial it started from, and which experts it left out."""
        sentences = []
        for number, stage in enumerate(self._stages):
            if stage.get("ancestor") is not None and SpaceChanges.model_validate(stage["changes"]) != SpaceChanges():
                without = f", without {' and '.join(stage['left_out'])}" if stage["left_out"] else ""
                start = f"started from trial {stage['ancestor']}"
                if stage.get("merged") is not None:
                    start += f", along paths through the layers of trial {stage['merged']} and the experts"
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
        if "choice" in stage:
            stage = stage["choice"][self.operator_of(trial)]
            point = tuple(point[column] for column in stage["columns"])
        numbers = [
            (dimension, dimension["low"] + x * (dimension["high"] - dimension["low"]))
            for dimension, x in zip(stage["space"], point, strict=True)
        ]
        if flow := self.data_flow_of(trial):
            num_places = sum(dimension["is_binary"] for dimension in stage["space"])
            on = layers_on(point[:num_places], flow.max_layers).tolist()
            switches = [(dimension, float(t in on)) for t, dimension in enumerate(stage["space"][:num_places])]
            scales = numbers[num_places:]
            return [*switches, *(scales[t] for t in on if scales)]
        return numbers + [(kept, kept["number"]) for kept in stage.get("kept", ())]

    def hypervolume(self) -> float:
        """Of the front's search values above the base's."""
        return front_hypervolume(self.trials, self.objectives, self.searched["base"])

    def pick(
        self,
        *,
        trial: int | None = None,
        at_knee: bool = False,
        preference: Mapping[str, float] | None = None,
        minimum: Mapping[str, float] | None = None,
        maximum: Mapping[str, float] | None = None,
    ) -> Trial:
        """Return one trial: by number, the front's knee, or the member that serves a preference best.

        A preference weighs objectives; one that it leaves out counts 1. minimum and maximum: objective -> the least or
        the largest value that a member may have, in the user's sign; with them alone, the knee of those that keep them.
        Picking uses search values. Raises: RunError if there is no such trial, it failed, or the front is empty.
        """
        bounds = minimum or {}, maximum or {}
        at_knee = at_knee or (trial is None and preference is None and any(bounds))
        if (trial is not None) + at_knee + (preference is not None) != 1:
            raise RunError("pick one model: --trial N, --knee, or --prefer NAME=WEIGHT,... (and --min, --max)")
        if trial is not None:
            if any(bounds):
                raise RunError(f"--trial {trial}: it names one model; --min and --max are for --knee and --prefer")
            found = self.trial(trial)
            if found.measurement is None:
                raise RunError(f"trial {trial} has no scores: {found.failure or 'it has not finished'}; pick another")
            return found
        if not self.front:
            raise RunError(
                f"{self.location}: no trial has finished within the floors and ceilings; there is no front yet"
            )
        front = self.front.within(*bounds)
        return front.knee() if preference is None else front.prefer(preference)

    def trial(self, number: int) -> Trial:
        """Return a trial by its number, whatever became of it. Raises: RunError if there is none."""
        if not 0 <= number < len(self.trials):
            raise RunError(f"{self.location}: no trial {number}; there are trials 0 to {len(self.trials) - 1}")
        return self.trials[number]

    def trials_frame(self) -> "pd.DataFrame":
        """Return all trials as a pandas frame, a row a trial; ``frames.py`` names the columns. Raises: InputError."""
        from evomerge.run.frames import frame_of, trial_rows

        return frame_of(trial_rows(self))

    def front_frame(self) -> "pd.DataFrame":
        """Return the front's trials in the same columns, best first in the first objective. Raises: InputError."""
        from evomerge.run.frames import frame_of, trial_rows

        return frame_of(trial_rows(self, self.front))

    def materialize(self, trial: Trial | int) -> "LiveModel":
        """Return a trial's model and processor, alive: in memory on the run's device, ready to predict.

        Raises: RunError if the trial has no scores, or checkpoints or items changed since; EvoMergeError if the tensors
        are not those that were tested.
        """
        from evomerge.run.rebuild import materialize

        return materialize(self, self.pick(trial=trial if isinstance(trial, int) else trial.number))

    def __repr__(self) -> str:
        return f"Run of {self.campaign.name} in {self.location}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the front, beside the reference models."""
        from evomerge.run.frames import as_html

        return as_html(self)


def open_run(given: str | Path | Location) -> Run:
    """Open a run by its folder, its name under runs/, or ``URL#NAME``. Raises: RunError."""
    return run_of(Ledger.open(find_place(given)))


def run_of(ledger: Ledger) -> Run:
    """Return the run whose ledger is open."""
    facts = ledger.facts()
    objectives = tuple(
        Objective(**{**objective, "parts": tuple(objective["parts"])}) for objective in facts["objectives"]
    )
    campaign = Campaign.model_validate(ledger.campaign(), strict=False)
    return Run(ledger.location, campaign, objectives, facts, ledger)


def require_same_inputs(run: Run, hashes: Mapping[str, str], items: str) -> None:
    """Raise RunError if checkpoints or items are no longer those that the run began with."""
    changed = [folder for folder, found in hashes.items() if run.facts["hashes"].get(folder) != found]
    if items != run.facts["items"]:
        changed.append(str(run.campaign.evaluation.get("data", "the evaluation's items")))
    if changed:
        raise RunError(
            f"{changed[0]} has changed since {run.location} began; its scores do not compare: put it back, or begin "
            "another run with --run"
        )
