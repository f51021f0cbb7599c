"""The space: a map between a point in [0, 1]^D and a recipe.

Shape letters: K experts, G groups, D dimensions. A parameter's numbers form a (K, G) matrix (one row for a parameter of
the whole merge); each entry is either fixed or reads one dimension of the point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from evomerge.errors import CampaignError, did_you_mean
from evomerge.records import Floats, Items, ParameterSpec
from evomerge.space.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bounds of a searched number, and where the search starts."""

    low: float
    high: float
    start: float


Setting = Range | float
"""A searched range or a fixed value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """How one parameter takes part: its setting for every expert and group, and exceptions by "expert/group" pattern.

    by_group: one number a group, or one for the whole model. The first exception that matches wins.
    """

    spec: ParameterSpec
    setting: Setting
    by_group: bool = True
    exceptions: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One coordinate of a point: which number it is, and its range."""

    parameter: str
    expert: str | None
    group: str | None
    low: float
    high: float
    start: float

    @property
    def name(self) -> str:
        """For example ``coefficient rot90/layer3``; experts and groups that share the number are left out."""
        place = "/".join(part for part in (self.expert, self.group) if part is not None)
        return f"{self.parameter} {place}".rstrip()


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Where each entry of a (K, G) matrix comes from: the dimension it reads, or -1 and its fixed value."""

    reads_KG: Items
    fixed_KG: Floats


class Space:
    """Point <-> parameter values over experts and groups.

    Raises: CampaignError for a range outside the operator's, an exception that matches nothing, or no dimension at all.
    """

    def __init__(self, experts: Sequence[str], groups: Groups, parameters: Sequence[Searched]) -> None:
        self.experts, self.groups = tuple(experts), dict(groups)
        dimensions: list[Dimension] = []
        self._matrices = {parameter.spec.name: self._lay_out(parameter, dimensions) for parameter in parameters}
        self.dimensions = tuple(dimensions)
        if not dimensions:
            raise CampaignError("space: nothing is searched; give at least one number a range {low: ..., high: ...}")
        self._low_D = np.array([dimension.low for dimension in dimensions])
        self.spans_D: Floats = np.array([dimension.high - dimension.low for dimension in dimensions])

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def start(self) -> Floats:
        """The point of all starts, shape (D,)."""
        start_D: Floats = (np.array([dimension.start for dimension in self.dimensions]) - self._low_D) / self.spans_D
        return start_D

    def values(self, point_D: Sequence[float] | Floats) -> dict[str, Floats]:
        """Return parameter -> (K, G) numbers (or (1, G))."""
        if np.shape(point_D) != (len(self),):
            raise ValueError(f"point: expected {len(self)} coordinates, got shape {np.shape(point_D)}")
        numbers_D = self._low_D + np.asarray(point_D, dtype=np.float64) * self.spans_D
        return {
            name: np.where(matrix.reads_KG >= 0, numbers_D[matrix.reads_KG], matrix.fixed_KG)
            for name, matrix in self._matrices.items()
        }

    def pull_back(self, gradients: Mapping[str, Floats]) -> Floats:
        """Return the gradient (D,) in the searched numbers' own units, from gradients in the (K, G) numbers."""
        gradient_D = np.zeros(len(self))
        for name, gradient_KG in gradients.items():
            reads_KG = self._matrices[name].reads_KG
            np.add.at(gradient_D, reads_KG[reads_KG >= 0], gradient_KG[reads_KG >= 0])
        return gradient_D

    def _lay_out(self, parameter: Searched, dimensions: list[Dimension]) -> _Matrix:
        """Append the parameter's dimensions and say where each of its entries comes from."""
        spec = parameter.spec
        rows: Sequence[str | None] = self.experts if spec.per_expert else (None,)
        by_group = parameter.by_group or bool(parameter.exceptions)
        reads_KG = np.full((len(rows), len(self.groups)), -1, dtype=np.int64)
        fixed_KG = np.zeros(reads_KG.shape)
        unused = set(parameter.exceptions)
        for k, expert in enumerate(rows):
            shared: int | None = None
            for g, group in enumerate(self.groups):
                pattern = _first_match(parameter.exceptions, expert, group)
                unused.discard(pattern)
                setting = parameter.setting if pattern is None else parameter.exceptions[pattern]
                _check_range(spec, setting)
                if not isinstance(setting, Range):
                    fixed_KG[k, g] = setting
                    continue
                if pattern is None and not parameter.by_group and shared is not None:
                    reads_KG[k, g] = shared
                    continue
                reads_KG[k, g] = len(dimensions)
                shared = len(dimensions) if pattern is None else shared
                label = group if by_group and len(self.groups) > 1 else None
                dimensions.append(
                    Dimension(
                        parameter=spec.name, expert=expert, group=label,
                        low=setting.low, high=setting.high, start=setting.start,
                    )
                )  # fmt: skip
        if unused:
            pattern = sorted(unused)[0]
            known = [f"{expert or '*'}/{group}" for expert in rows for group in self.groups]
            raise CampaignError(
                f"space: {spec.name}: no expert/group matches {pattern!r}{did_you_mean(pattern, known)}"
            )
        return _Matrix(reads_KG, fixed_KG)


def _first_match(exceptions: Mapping[str, Setting], expert: str | None, group: str) -> str | None:
    place = f"{expert or '*'}/{group}"
    return next((pattern for pattern in exceptions if fnmatchcase(place, pattern)), None)


def _check_range(spec: ParameterSpec, setting: Setting) -> None:
    numbers = (setting.low, setting.high, setting.start) if isinstance(setting, Range) else (setting,)
    for number in numbers:
        if not spec.minimum <= number <= spec.maximum:
            raise CampaignError(
                f"space: {spec.name}: expected a number in [{spec.minimum:g}, {spec.maximum:g}], found {number:g}"
            )
    if isinstance(setting, Range) and not setting.low <= setting.start <= setting.high:
        raise CampaignError(
            f"space: {spec.name}: expected low <= start <= high, "
            f"found low {setting.low:g}, start {setting.start:g}, high {setting.high:g}"
        )
    if isinstance(setting, Range) and setting.low == setting.high:
        raise CampaignError(f"space: {spec.name}: low and high are both {setting.low:g}; give one number to fix it")
