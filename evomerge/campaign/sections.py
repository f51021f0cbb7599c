"""The sections of a campaign file: what a user may write, strictly read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from evomerge.records import Options, Split
from evomerge.space.shares import ShareOptions
from evomerge.strict import NAME
from evomerge.workers.inline import InlineOptions
from evomerge.workers.ray_cluster import RayOptions

Name = Annotated[str, Field(pattern=NAME)]


class BoundsSection(Options):
    """Where a number is searched, one a group: from low to high (default: the operator's range).

    knots: instead, this many numbers evenly spaced over the depth of the network, with straight lines between; 1 is one
    number for all groups that the range is for.
    """

    low: float | None = None
    high: float | None = None
    knots: int | None = Field(default=None, ge=1)


class RangeSection(BoundsSection):
    """A searched number, which starts where it says (default: where the operator does, within the bounds)."""

    start: float | None = None


class CoefficientSection(BoundsSection):
    """The coefficients' range; they can start at the experts' shares, too, as far as the bounds allow."""

    start: float | ShareOptions | None = None


BEST = "best"

Fixed = float | Annotated[list[float], Field(min_length=1)] | Literal["best"]
"""A number; numbers evenly spaced over the depth of the network, with straight lines between; in stages, ``best``: what
the best trial of the stages before has."""

Exceptions = dict[str, Fixed | RangeSection]
"""By "expert/group" pattern, a fixed number or a range of its own; the first that matches wins."""


class ParameterSection(RangeSection):
    """A searched parameter of the operator, such as ``density: {low: 0.1, high: 0.9}``.

    per: one number for the whole ``model`` (and an expert, where each has its own), the default, or one a ``group``.
    exceptions: as those of the space.
    """

    per: Literal["model", "group"] | None = None
    exceptions: Exceptions = {}

    @model_validator(mode="after")
    def _say_it_once(self) -> "ParameterSection":
        if self.per and self.knots:
            raise ValueError("give per or knots, not both: knots are laid over the groups")
        return self


class SpaceSection(Options):
    """Which tensors share a number, and where the coefficients are searched.

    preset: a space by name; keys that stand here replace its own. groups: tensors that share a number: all of
    the ``model``, those of a ``layer``, of a kind of ``module`` in a layer, each ``tensor``, or name -> patterns of
    tensors' names. coefficient: a number that is not searched, one for each of several depths, or a range. exceptions:
    pattern of "expert/group" -> the same for these alone; the first that matches wins.
    """

    kind: Literal["parameter", "data_flow"] = "parameter"  # data_flow: another section, see ``AnySpace``
    preset: str | None = None
    groups: Literal["model", "layer", "module", "tensor"] | dict[str, str | list[str]] = "layer"
    coefficient: Fixed | CoefficientSection = CoefficientSection()
    exceptions: dict[str, Fixed | CoefficientSection] = {}


class ScaleSection(Options):
    """The range of the scales on what layers read."""

    low: float = 0.5
    high: float = 1.5
    start: float = 1.0


class DataFlowSection(Options):
    """Layers of the experts in one sequence: they stand there ``repeats`` times, and at most max_layers are on.

    As a stage's own space, the layers of the best merge of the stages before stand before the experts'.

    scale: of what a layer reads, searched for each layer; a number is the same for all and not searched.
    """

    kind: Literal["data_flow"]
    repeats: int = Field(default=2, ge=1)
    max_layers: int | None = Field(default=None, ge=1)
    scale: float | ScaleSection = ScaleSection()


def space_kind(given: Any) -> str:
    """Return the name of the section that a space, read or not yet, is of."""
    kind = given.get("kind") if isinstance(given, Mapping) else getattr(given, "kind", None)
    return DataFlowSection.__name__ if kind == "data_flow" else SpaceSection.__name__


AnySpace = Annotated[
    Annotated[SpaceSection, Tag(SpaceSection.__name__)] | Annotated[DataFlowSection, Tag(DataFlowSection.__name__)],
    Discriminator(space_kind),
]


class StageSpaceSection(Options):
    """Keys of the space that a stage replaces by its own."""

    kind: Literal["parameter", "data_flow"] = "parameter"  # data_flow: another section, see ``AnyStageSpace``
    groups: Literal["model", "layer", "module", "tensor"] | dict[str, str | list[str]] | None = None
    coefficient: Fixed | RangeSection | None = None
    exceptions: Exceptions | None = None


MERGED = "merged"
"""What the best merge of earlier stages is called among the experts of a data-flow stage; it leads them."""

AnyStageSpace = Annotated[
    Annotated[StageSpaceSection, Tag(SpaceSection.__name__)]
    | Annotated[DataFlowSection, Tag(DataFlowSection.__name__)],
    Discriminator(space_kind),
]


class SpaceChanges(Options):
    """What a stage changes: keys of the space, parameters of the operator, and how many experts take part.

    A data-flow space is a stage's own as a whole. keep_experts: those that matter most in the best merge of the stages
    before; the others' coefficients are 0, and their layers are in no path.
    """

    space: AnyStageSpace = StageSpaceSection()
    operator: dict[str, Any] = {}
    keep_experts: int | None = Field(default=None, ge=1)


Names = Annotated[list[Name], Field(min_length=2)]


class ObjectiveSection(Options):
    """A metric of a task (direction only where the metric does not say), or the mean or worst of other objectives.

    task, metric: as the evaluator names them. mean, worst: names of other objectives, which then steer through it
    alone. normalized_by: part -> the expert by whose own score it is divided. floor, ceiling: what models have to keep;
    those that do not are searched away from, and are not on the front.
    """

    name: Name
    task: str | None = None
    metric: str | None = None
    mean: Names | None = None
    worst: Names | None = None
    normalized_by: dict[Name, str] = {}
    direction: Literal["max", "min"] | None = None
    floor: float | None = None
    ceiling: float | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "ObjectiveSection":
        given = [key for key in ("task", "metric", "mean", "worst", "direction") if getattr(self, key) is not None]
        if given not in (["task", "metric"], ["task", "metric", "direction"], ["mean"], ["worst"]):
            raise ValueError(
                "expected task and metric (and direction, where the metric does not say), or mean, or worst; found "
                f"{', '.join(given) or 'none of them'}"
            )
        if self.normalized_by and self.task:
            raise ValueError("normalized_by goes with mean or worst")
        return self

    @property
    def parts(self) -> list[str]:
        """The objectives that a summary is made of; none of a metric."""
        return self.mean or self.worst or []


class SplitSection(Options):
    """Shares of the items, by source: what gradients follow, what steers the search, and what is scored at the end."""

    adapt: float = Field(default=0.2, ge=0, lt=1)
    search: float = Field(default=0.4, gt=0, lt=1)
    test: float = Field(default=0.4, gt=0, lt=1)

    def shares(self) -> dict[Split, float]:
        """Split -> share."""
        return {"adapt": self.adapt, "search": self.search, "test": self.test}

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitSection":
        if abs(self.adapt + self.search + self.test - 1) > 1e-6:
            raise ValueError(f"expected shares that sum to 1, found {self.adapt + self.search + self.test:g}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorSection:
    """One evaluator's kind and options, and what it scores: task -> metrics. where: its path in the file."""

    kind: str
    options: Options
    wanted: Mapping[str, list[str]]
    where: str


class SeveralSection(Options):
    """Several evaluators in one campaign, each with the tasks that it scores."""

    kind: str
    evaluators: list[dict[str, Any]] = Field(min_length=1)


class BudgetSection(Options):
    """How long to search.

    evaluations: candidates that are scored, all stages together; a larger number extends a finished run.
    """

    evaluations: int = Field(ge=1)


WORKERS: dict[Any, type[Options]] = {"inline": InlineOptions, "ray": RayOptions}


def _workers_kind(given: Any) -> str:
    return WORKERS[given["kind"] if isinstance(given, Mapping) else given.kind].__name__


WorkersSection = Annotated[
    Annotated[InlineOptions, Tag(InlineOptions.__name__)] | Annotated[RayOptions, Tag(RayOptions.__name__)],
    Discriminator(_workers_kind),
]
"""Where candidates are scored."""


class StageSection(SpaceChanges):
    """One search: a proposer, the keys of its options, and what it changes of the space.

    proposer: by name. evaluations: its part of the budget (default: what the other stages leave).
    """

    proposer: str
    evaluations: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = {}

    @property
    def changes(self) -> SpaceChanges:
        """What the stage changes of the space."""
        return SpaceChanges(space=self.space, operator=self.operator, keep_experts=self.keep_experts)
