"""The campaign file, strictly read: every mistake is named with its path in the file.

The sections say what a user may write; names (of operators, proposers, evaluators) and their options are checked
against the tables of ``assemble.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from evomerge import assemble
from evomerge.errors import CampaignError, did_you_mean
from evomerge.records import Options

Section = TypeVar("Section", bound=Options)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class RangeSection(Options):
    """A searched number: bounds and start (default: the operator's, within the bounds)."""

    low: float | None = None
    high: float | None = None
    start: float | None = None


class CoefficientSection(RangeSection):
    """The coefficients' range."""


class ParameterSection(RangeSection):
    """A searched operator parameter: one number for the whole model (an expert), or one a group."""

    per: Literal["model", "group"] = "model"


Exceptions = dict[str, float | RangeSection]


class SpaceSection(Options):
    """Which tensors share a number, and where the coefficients are searched.

    exceptions: by "expert/group" pattern, a fixed number or a range of its own; the first that matches wins.
    """

    preset: str | None = None
    groups: Literal["model", "layer", "module", "tensor"] | dict[str, str | list[str]] = "layer"
    coefficient: float | CoefficientSection = CoefficientSection()
    exceptions: Exceptions = {}


class ObjectiveSection(Options):
    """A metric of a task; direction only where the metric does not say."""

    name: Name
    task: str
    metric: str
    direction: Literal["max", "min"] | None = None
    floor: float | None = None
    ceiling: float | None = None


class SplitSection(Options):
    """Shares of the items, by source."""

    adapt: float = Field(default=0.2, ge=0, lt=1)
    search: float = Field(default=0.4, gt=0, lt=1)
    test: float = Field(default=0.4, gt=0, lt=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitSection":
        if abs(self.adapt + self.search + self.test - 1) > 1e-6:
            raise ValueError(f"expected shares that sum to 1, found {self.adapt + self.search + self.test:g}")
        return self


class BudgetSection(Options):
    """How long to search: candidates scored on all search items."""

    evaluations: int = Field(ge=1)


class WorkersSection(Options):
    """Where candidates are scored."""

    kind: Literal["inline"] = "inline"


class StageSection(Options):
    """One search: a proposer, its share of the budget (default: what is left), and its options."""

    proposer: str
    evaluations: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = {}


class Campaign(Options):
    """What is merged, what is searched, what is scored, and how long."""

    name: Name
    base: str
    experts: dict[Name, str] = Field(min_length=1)
    operator: dict[str, Any] = {"name": "task_arithmetic"}
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    space: SpaceSection = SpaceSection()
    objectives: list[ObjectiveSection] = Field(min_length=1)
    evaluation: dict[str, Any]
    search: Literal["auto"] | list[StageSection] = "auto"
    budget: BudgetSection
    workers: WorkersSection = WorkersSection()
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    folder: Path = Path()
    """Where relative paths start: the campaign file's folder."""

    @property
    def split(self) -> SplitSection:
        """The shares of the evaluation's items."""
        return parse(SplitSection, self.evaluation.get("split", {}), "evaluation.split")

    def evaluation_options(self) -> Options:
        """The options of the evaluator that ``evaluation.kind`` names."""
        rest = {key: value for key, value in self.evaluation.items() if key not in ("kind", "split")}
        return parse(assemble.EVALUATORS[self.evaluation["kind"]].options_type, rest, "evaluation")

    def stage_options(self, number: int) -> Options:
        """The options of a listed stage's proposer."""
        assert not isinstance(self.search, str)
        stage = self.search[number]
        return parse(assemble.PROPOSERS[stage.proposer].options_type, stage.options, f"search[{number}]")

    def meaning(self) -> dict[str, Any]:
        """Return the keys that change what a score means or what is proposed; a run is bound to them."""
        whole = self.model_dump(mode="json", exclude={"budget", "workers", "name", "folder", "device"})
        return {**whole, "base": self._absolute(self.base), "experts": self._absolute_experts()}

    def _absolute(self, location: str) -> str:
        path = (self.folder / location).expanduser().resolve()
        return str(path) if path.is_dir() else location

    def _absolute_experts(self) -> dict[str, str]:
        return {name: self._absolute(location) for name, location in self.experts.items()}


def read_campaign(path: Path) -> Campaign:
    """Read and check a campaign file. Raises: CampaignError that names the key."""
    data = read_yaml(path)
    if "folder" in data:
        raise CampaignError(f"{path}: folder: unknown key{did_you_mean('folder', set(Campaign.model_fields) - {'folder'})}")
    try:
        data = {**data, "search": _stages(data.get("search", "auto"))}
        if isinstance(data.get("space"), Mapping) and "preset" in data["space"]:
            data["space"] = {**_preset(data["space"]["preset"]), **data["space"]}
        campaign = parse(Campaign, {**data, "folder": path.resolve().parent}, "")
        _check_names(campaign)
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__
    return campaign


def parse(section: type[Section], data: Any, where: str) -> Section:
    """Validate data against a section. Raises: CampaignError with the path of the first mistake and what to do."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        first, steps = _deepest(error)
        path = _join(where, steps)
        if first["type"] == "extra_forbidden":
            known = _fields_at(section, steps[:-1])
            raise CampaignError(f"{path}: unknown key{did_you_mean(str(steps[-1]), known)}") from error
        if first["type"] == "missing":
            raise CampaignError(f"{path}: missing; {_expected(section, steps)}") from error
        found = first["input"]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        shown = f", found {found!r}" if isinstance(found, str | int | float | bool | None) else ""
        raise CampaignError(f"{path}: {message}{shown}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a key that is given twice is a mistake. Raises: CampaignError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        raise CampaignError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CampaignError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise CampaignError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise CampaignError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def _check_names(campaign: Campaign) -> None:
    """Look the names up that the sections only hold as text, and the options that go with them."""
    name = campaign.operator.get("name")
    if name not in assemble.OPERATORS:
        raise CampaignError(f"operator.name: unknown operator {name!r}{did_you_mean(str(name), assemble.OPERATORS)}")
    kind = campaign.evaluation.get("kind")
    if kind not in assemble.EVALUATORS:
        raise CampaignError(f"evaluation.kind: unknown evaluator {kind!r}{did_you_mean(str(kind), assemble.EVALUATORS)}")
    campaign.evaluation_options()
    shares = campaign.split
    names = [objective.name for objective in campaign.objectives]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise CampaignError(f"objectives: the name {doubles[0]!r} is given twice")
    for number, stage in enumerate([] if isinstance(campaign.search, str) else campaign.search):
        if stage.proposer not in assemble.PROPOSERS:
            known = did_you_mean(stage.proposer, assemble.PROPOSERS)
            raise CampaignError(f"search[{number}].proposer: unknown proposer {stage.proposer!r}{known}")
        campaign.stage_options(number)
        if assemble.PROPOSERS[stage.proposer].needs_gradients and shares.adapt == 0:
            raise CampaignError(f"search[{number}]: {stage.proposer} trains on adapt items, but evaluation.split.adapt is 0")


def _stages(given: Any) -> Any:
    """Gather a listed stage's own options under ``options``, as the section holds them."""
    if not isinstance(given, list):
        return given
    kept = ("proposer", "evaluations")
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
    here = Path(__file__).parent
    return here / "search_spaces" if (here / "search_spaces").is_dir() else here.parent / "search_spaces"


def _preset(name: Any) -> dict[str, Any]:
    known = sorted(path.stem for path in presets_folder().glob("*.yaml"))
    if name not in known:
        raise CampaignError(f"space.preset: unknown preset {name!r}{did_you_mean(str(name), known)}")
    return read_yaml(presets_folder() / f"{name}.yaml")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and no key stands twice."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _join(where: str, steps: list[Any]) -> str:
    path = where
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path or "the file"


def _deepest(error: ValidationError) -> tuple[Any, list[Any]]:
    """Return the first mistake and its path; of alternatives that all failed, the one that came farthest."""
    found = [(mistake, [step for step in mistake["loc"] if not _is_union_branch(step)]) for mistake in error.errors()]
    prefix = found[0][1]
    return max((pair for pair in found if pair[1][: len(prefix)] == prefix), key=lambda pair: len(pair[1]))


def _is_union_branch(step: Any) -> bool:
    """Pydantic puts the name of the tried alternative into the path; a user did not write it."""
    return isinstance(step, str) and (
        step.endswith("Section") or "[" in step or step in ("float", "str", "constrained-str", "int")
    )


def _fields_at(section: type[Options], steps: list[Any]) -> list[str]:
    """Return the known keys of the section that the path leads to."""
    current: type[Options] = section
    for step in steps:
        field = current.model_fields.get(step) if isinstance(step, str) else None
        if field is None:
            continue
        inner = re.findall(r"\b\w+Section\b", str(field.annotation))
        if inner:
            current = globals()[inner[0]]
    return [name for name in current.model_fields if name != "folder"]


def _expected(section: type[Options], steps: list[Any]) -> str:
    known = _fields_at(section, steps[:-1])
    return f"expected here: {', '.join(known)}"
