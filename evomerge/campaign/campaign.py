"""The campaign file, strictly read: every mistake is named with its path in the file.

``sections.py`` says what a user may write; names (of operators, proposers, evaluators) and their options are checked
against the tables of ``assemble.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.campaign import assemble
from evomerge.campaign.sections import (
    MERGED,
    WORKERS,
    AnySpace,
    BudgetSection,
    CoefficientSection,
    DataFlowSection,
    EvaluatorSection,
    Name,
    ObjectiveSection,
    SeveralSection,
    SpaceChanges,
    SpaceSection,
    SplitSection,
    StageSection,
    WorkersSection,
    space_kind,
)
from evomerge.errors import CampaignError, did_you_mean
from evomerge.fidelity.race import RaceOptions
from evomerge.operators.passthrough import Passthrough
from evomerge.records import Options
from evomerge.space.shares import ShareOptions
from evomerge.strict import parse, read_yaml
from evomerge.trackers import KINDS, TrackerOptions, kind_of
from evomerge.workers.inline import InlineOptions
from evomerge.workers.ray_cluster import RayOptions

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Campaign(Options):
    """What is merged, what is searched, what is scored, and how long.

    name: of the run, which lies in ``runs/NAME`` unless ``--run`` says otherwise. base: a folder or a Hugging Face id.
    experts: name -> a folder or an id, of a checkpoint or a LoRA adapter. operator: its ``name``, its options, and
    numbers or ranges of its parameters; of a list, the search chooses. dtype: of the merge (auto: the base's).
    space: which numbers are searched, and between what. objectives: what models are compared by. evaluation: its
    ``kind``, the keys of that kind, and ``split``. fidelity: ``{}`` races candidates; none scores each on all search
    items. search: the stages. budget: how long. workers: where candidates are scored; ``ray:8`` is short for a section.
    trackers: who else is told of every trial. device: cpu, cuda, or several as ``cuda:0,cuda:1``; auto takes GPUs where
    there are some. residence: where base and experts lie while the model is on a GPU. seed: of splits and draws.
    """

    name: Name
    base: str
    experts: dict[Name, str] = Field(min_length=1)
    operator: dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)] = {"name": "task_arithmetic"}
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    space: AnySpace = SpaceSection()
    objectives: list[ObjectiveSection] = Field(min_length=1)
    evaluation: dict[str, Any]
    fidelity: RaceOptions | None = None
    search: Literal["auto"] | list[StageSection] = "auto"
    budget: BudgetSection
    workers: WorkersSection = InlineOptions()
    trackers: list[TrackerOptions] = []
    device: str = "auto"
    residence: Literal["auto", "resident", "int8", "host"] = "auto"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _layers_are_taken_as_they_are(cls, given: Any) -> Any:
        """A data-flow space merges nothing: its operator is passthrough, and need not be given."""
        if isinstance(given, Mapping) and space_kind(given.get("space")) == DataFlowSection.__name__:
            return {"operator": {"name": Passthrough.name}, **given}
        return given

    @field_validator("workers", mode="before")
    @classmethod
    def _by_kind(cls, given: Any) -> Any:
        """``workers: ray:8`` is short for ``workers: {kind: ray, count: 8}``."""
        if isinstance(given, str):
            name, _, count = given.partition(":")
            given = {"kind": name, **({"count": int(count) if count.isdecimal() else count} if count else {})}
        kind = given.get("kind") if isinstance(given, Mapping) else getattr(given, "kind", None)
        if kind not in WORKERS:
            raise ValueError(f"unknown kind {kind!r}{did_you_mean(str(kind), WORKERS)}")
        return given

    @field_validator("trackers", mode="before")
    @classmethod
    def _known_trackers(cls, given: Any) -> Any:
        for one in given if isinstance(given, list) else []:
            if (kind := kind_of(one)) not in KINDS:
                raise ValueError(f"unknown kind {kind!r}{did_you_mean(str(kind), KINDS)}")
        return given

    @property
    def operators(self) -> dict[str, dict[str, Any]]:
        """Path in the file -> section of each operator that the search may choose; mostly one."""
        if isinstance(self.operator, dict):
            return {"operator": self.operator}
        return {f"operator[{number}]": section for number, section in enumerate(self.operator)}

    @property
    def operator_names(self) -> list[str]:
        """Names of the operators that the search may choose, in the order of the file."""
        return [section["name"] for section in self.operators.values()]

    @property
    def lays_paths_through_merges(self) -> bool:
        """Whether a stage of a campaign that merges weights goes on to lay paths of layers."""
        stages = [] if isinstance(self.search, str) else self.search
        is_merging = isinstance(self.space, SpaceSection)
        return is_merging and any(isinstance(stage.space, DataFlowSection) for stage in stages)

    @property
    def split(self) -> SplitSection:
        """The shares of the evaluation's items."""
        return parse(SplitSection, self.evaluation.get("split", {}), "evaluation.split")

    @property
    def wanted(self) -> dict[str, list[str]]:
        """Task -> the metrics that objectives ask for, in the order of the file."""
        asked: dict[str, list[str]] = {}
        for objective in self.objectives:
            if objective.task and objective.metric:
                metrics = asked.setdefault(objective.task, [])
                metrics.extend([objective.metric] if objective.metric not in metrics else [])
        return asked

    @property
    def evaluators(self) -> list[EvaluatorSection]:
        """The evaluators, each with its tasks; mostly one, which has them all."""
        rest = {key: value for key, value in self.evaluation.items() if key != "split"}
        if rest.get("kind") == assemble.SEVERAL:
            return _several(rest, self.wanted)
        return [_evaluator(rest, self.wanted, "evaluation")]

    def stage_options(self, number: int) -> Options:
        """The options of a listed stage's proposer."""
        assert not isinstance(self.search, str)
        stage = self.search[number]
        return parse(
            assemble.proposer_type(stage.proposer, f"search[{number}].proposer").options_type,
            stage.options,
            f"search[{number}]",
        )

    def changed(self, changes: SpaceChanges) -> "Campaign":
        """Return the campaign with a stage's space and parameters in place of its own. Raises: CampaignError."""
        if isinstance(self.space, DataFlowSection):
            raise CampaignError("space: a data-flow space is the same in all stages; leave out what this one changes")
        if isinstance(changes.space, DataFlowSection):
            return self.model_copy(update={"space": changes.space})
        given = {key: value for key, value in changes.space if value is not None}
        space = self.space.model_copy(update=given)
        return self.model_copy(update={"space": space, "operator": self._changed_operator(changes.operator)})

    def _changed_operator(self, changes: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the operator's section (or sections) with other parameters; options stay what they are."""
        names = self.operator_names
        name = changes.get("name", names[0] if len(names) == 1 else None)
        if changes and name not in names:
            raise CampaignError(
                f"operator.name: expected one of {', '.join(names)}, whose parameters change, found {name!r}"
            )
        if fixed := [
            key for key in changes if key in assemble.operator_type(name, "operator.name").options_type.model_fields
        ]:
            raise CampaignError(
                f"operator.{fixed[0]}: an option is the same in all stages; give it in the campaign's own operator"
            )
        sections = [
            {**section, **changes} if section["name"] == name else section for section in self.operators.values()
        ]
        return sections[0] if isinstance(self.operator, dict) else sections

    def meaning(self) -> dict[str, Any]:
        """Return the keys that change what a score means or what is proposed; a run is bound to them."""
        exclude = {"budget", "workers", "trackers", "name", "device"} | (
            {"residence"} if self.residence != "int8" else set()
        )
        return self.model_dump(mode="json", exclude=exclude)


def read_campaign(path: str | Path, workers: str | None = None) -> Campaign:
    """Read and check a campaign file; workers: in place of the file's. Raises: CampaignError that names the key."""
    path = Path(path)
    data = read_yaml(path) | ({"workers": workers} if workers else {})
    try:
        data = {**data, "search": _stages(data.get("search", "auto"))}
        if isinstance(data.get("space"), Mapping) and "preset" in data["space"]:
            data["space"] = {**_preset(data["space"]["preset"]), **data["space"]}
        campaign = parse(Campaign, data, "")
        _check_names(campaign)
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__
    return _located(campaign, path.resolve().parent)


def read_tasks(path: str | Path, campaign: Campaign) -> Campaign:
    """Return a campaign with the evaluation and objectives of a file in place of its own, to score its models anew.

    Nothing is searched, so nothing is split. Raises: CampaignError that names the key.
    """
    path = Path(path)
    data = read_yaml(path)
    if unknown := sorted(data.keys() - {"evaluation", "objectives"}):
        raise CampaignError(f"{path}: {unknown[0]}: expected evaluation and objectives alone, as a campaign has them")
    if isinstance(data.get("evaluation"), Mapping) and "split" in data["evaluation"]:
        raise CampaignError(f"{path}: evaluation.split: all items are scored and none steers; leave split out")
    rest = {"name": campaign.name, "base": campaign.base, "experts": campaign.experts, "budget": {"evaluations": 1}}
    try:
        read = parse(Campaign, {**rest, **data}, "")
        _check_names(read)
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__
    evaluation = _located_evaluation(read.evaluation, path.resolve().parent)
    return campaign.model_copy(update={"evaluation": evaluation, "objectives": read.objectives, "fidelity": None})


def locate(location: str, folder: Path) -> str:
    """Return the absolute path of a checkpoint given relative to a file's folder; a Hugging Face id stays as it is."""
    path = folder / Path(location).expanduser()
    return str(path.resolve()) if path.is_dir() or not HUB_ID.fullmatch(location) else location


def _located(campaign: Campaign, folder: Path) -> Campaign:
    """Make every path absolute, so that a campaign means the same wherever it is read again."""
    evaluation = _located_evaluation(campaign.evaluation, folder)
    experts = {name: locate(location, folder) for name, location in campaign.experts.items()}
    update: dict[str, Any] = {
        "base": locate(campaign.base, folder),
        "experts": experts,
        "evaluation": evaluation,
        "trackers": [tracker.located(folder) for tracker in campaign.trackers],
    }
    if isinstance(campaign.workers, RayOptions):
        update["workers"] = campaign.workers.located(folder)
    return campaign.model_copy(update=update)


def _located_evaluation(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if section["kind"] == assemble.SEVERAL:
        return {**section, "evaluators": [_located_evaluation(part, folder) for part in section["evaluators"]]}
    paths = {key for key in assemble.EVALUATORS[section["kind"]].paths if section.get(key) is not None}
    return {**section, **{key: str((folder / Path(section[key]).expanduser()).resolve()) for key in paths}}


def _evaluator(section: Mapping[str, Any], wanted: Mapping[str, list[str]], where: str) -> EvaluatorSection:
    entry = assemble.look_up(
        {**assemble.EVALUATORS, assemble.SEVERAL: None}, section.get("kind"), "evaluator", f"{where}.kind"
    )
    if entry is None:
        raise CampaignError(f"{where}.kind: several evaluators are listed once, under evaluation")
    options = {key: value for key, value in section.items() if key != "kind"}
    return EvaluatorSection(
        kind=section["kind"], options=parse(entry.options_type, options, where), wanted=wanted, where=where
    )


def _several(section: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> list[EvaluatorSection]:
    """Read the listed evaluators; every task that an objective names has one of them."""
    sections, homes = [], dict[str, str]()
    for number, part in enumerate(parse(SeveralSection, section, "evaluation").evaluators):
        where = f"evaluation.evaluators[{number}]"
        tasks = part.get("tasks")
        if not isinstance(tasks, list) or not tasks:
            raise CampaignError(f"{where}.tasks: expected a list of the tasks that it scores, found {tasks!r}")
        for task in tasks:
            if task not in wanted:
                raise CampaignError(f"{where}.tasks: no objective is of task {task!r}{did_you_mean(str(task), wanted)}")
            if task in homes:
                raise CampaignError(f"{where}.tasks: {task} is scored by {homes[task]} already; list it once")
            homes[task] = where
        rest = {key: value for key, value in part.items() if key != "tasks"}
        sections.append(_evaluator(rest, {task: wanted[task] for task in tasks}, where))
    if missing := [task for task in wanted if task not in homes]:
        raise CampaignError(f"evaluation.evaluators: none of them lists task {missing[0]!r}; add it to one's tasks")
    return sections


def _check_names(campaign: Campaign) -> None:
    """Look the names up that the sections only hold as text, and the options that go with them."""
    for where, section in campaign.operators.items():
        assemble.operator_type(section.get("name"), f"{where}.name")
    if doubles := sorted({name for name in campaign.operator_names if campaign.operator_names.count(name) > 1}):
        raise CampaignError(f"operator: {doubles[0]} is listed twice; list it once, the search ranges over its numbers")
    if isinstance(campaign.space, DataFlowSection) and campaign.operator != {"name": Passthrough.name}:
        raise CampaignError(
            "operator: a data-flow space takes layers as they are and merges nothing; leave operator out"
        )
    shares = campaign.split
    _check_starts(campaign)
    _check_objectives(campaign)
    _check_paths(campaign)
    _ = campaign.evaluators
    for number, stage in enumerate([] if isinstance(campaign.search, str) else campaign.search):
        proposer = assemble.proposer_type(stage.proposer, f"search[{number}].proposer")
        campaign.stage_options(number)
        if proposer.needs_gradients and shares.adapt == 0:
            raise CampaignError(
                f"search[{number}]: {stage.proposer} trains on adapt items, but evaluation.split.adapt is 0"
            )


def _check_starts(campaign: Campaign) -> None:
    """Shares by given numbers need one for each expert."""
    if isinstance(campaign.space, DataFlowSection):
        return
    sections = {"space.coefficient": campaign.space.coefficient}
    sections |= {f"space.exceptions.{place}": given for place, given in campaign.space.exceptions.items()}
    for where, section in sections.items():
        start = section.start if isinstance(section, CoefficientSection) else None
        if not isinstance(start, ShareOptions) or isinstance(start.by, str):
            continue
        for expert in start.by:
            if expert not in campaign.experts:
                known = did_you_mean(expert, campaign.experts)
                raise CampaignError(f"{where}.start.by: unknown expert {expert!r}{known}")
        if missing := [expert for expert in campaign.experts if expert not in start.by]:
            raise CampaignError(f"{where}.start.by: expected a number for each expert, found none for {missing[0]!r}")


def _check_paths(campaign: Campaign) -> None:
    """A data-flow stage lays paths through the best merge of those before it, and nothing is merged after it."""
    stages = [] if isinstance(campaign.search, str) else campaign.search
    later = None
    for number, stage in reversed(list(enumerate(stages))):
        where = f"search[{number}]"
        if not isinstance(stage.space, DataFlowSection):
            later = where
        elif isinstance(campaign.space, DataFlowSection):
            continue  # what such a campaign may change of its space is said by ``changed``
        elif later:
            raise CampaignError(
                f"{later}: it merges weights after {where} has laid paths of layers, which are no weights; put it "
                "before, or give it a space of kind: data_flow"
            )
        elif number == 0:
            raise CampaignError(
                f"{where}.space: a data-flow stage lays paths through the best merge of the stages before, and there "
                "are none; put a stage before it, or give the campaign itself a space of kind: data_flow"
            )
        elif stage.operator:
            raise CampaignError(
                f"{where}.operator: a data-flow space takes layers as they are and merges nothing; leave operator out"
            )
        elif MERGED in campaign.experts:
            raise CampaignError(
                f"experts.{MERGED}: so the best merge is called in {where}, which lays paths; give the expert another "
                "name"
            )


def _check_objectives(campaign: Campaign) -> None:
    """Every name once; a summary is made of metrics that are listed, and normalized by experts."""
    names = [objective.name for objective in campaign.objectives]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise CampaignError(f"objectives: the name {doubles[0]!r} is given twice")
    metrics = [objective.name for objective in campaign.objectives if objective.task]
    for number, objective in enumerate(campaign.objectives):
        where = f"objectives[{number}]"
        for part in objective.parts:
            if part not in metrics:
                known = did_you_mean(part, metrics)
                raise CampaignError(f"{where}: expected names of objectives that have a metric, found {part!r}{known}")
        if doubles := sorted({part for part in objective.parts if objective.parts.count(part) > 1}):
            raise CampaignError(f"{where}: {doubles[0]} is listed twice")
        for part, expert in objective.normalized_by.items():
            if part not in objective.parts:
                raise CampaignError(f"{where}.normalized_by: {part!r} is none of {', '.join(objective.parts)}")
            if expert not in campaign.experts:
                known = did_you_mean(expert, campaign.experts)
                raise CampaignError(f"{where}.normalized_by.{part}: unknown expert {expert!r}{known}")


def _stages(given: Any) -> Any:
    """Gather a listed stage's own options under ``options``, as the section holds them."""
    if not isinstance(given, list):
        return given
    kept = StageSection.model_fields.keys() - {"options"}
    return [
        {
            **{key: stage[key] for key in kept if key in stage},
            "options": {key: value for key, value in stage.items() if key not in kept},
        }
        if isinstance(stage, dict)
        else stage
        for stage in given
    ]


def presets_folder() -> Path:
    """Return where the presets lie: in the installed package, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    return here / "search_spaces" if (here / "search_spaces").is_dir() else here.parent / "search_spaces"


def _preset(name: Any) -> dict[str, Any]:
    known = sorted(path.stem for path in presets_folder().glob("*.yaml"))
    if name not in known:
        raise CampaignError(f"space.preset: unknown preset {name!r}{did_you_mean(str(name), known)}")
    return read_yaml(presets_folder() / f"{name}.yaml")
