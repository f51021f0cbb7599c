"""The space: a map between a point in [0, 1]^D and a recipe.

Shape letters: K experts, G groups, D dimensions, N knots, E entries of a sparse matrix. A parameter's numbers form a
(K, G) matrix (one row for a parameter of the whole merge), which is affine in the numbers that are searched.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.errors import CampaignError, did_you_mean
from evomerge.records import Floats, Items, ParameterSpec
from evomerge.space.depth import Depths, knot_weights
from evomerge.space.groups import Groups, first_match
from evomerge.space.shares import Measure, ShareOptions, shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bounds of a searched number, and where the search starts.

    knots: None is a number a group; N are N numbers, evenly spaced over depth, with straight lines between them; so 1
    is one number for all groups. shares: the experts decide the start (``with_starts``); until then ``start`` holds.
    """

    low: float
    high: float
    start: float
    knots: int | None = None
    shares: ShareOptions | None = None


Sizes = Callable[[Measure], Floats]
"""A measure of task vectors -> its sums over the entries of every group, (K, G)."""

Setting = Range | float | tuple[float, ...] | Floats
"""A searched range, a fixed number, fixed numbers interpolated over depth, or (K, G) numbers of an earlier stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """How one parameter takes part: its setting for every expert and group, and exceptions by "expert/group" pattern.

    The first exception that matches wins. The numbers of a range are an expert's own. left_out: experts that take no
    part, whatever else is said of them, and the number that they have instead.
    """

    spec: ParameterSpec
    setting: Setting
    exceptions: Mapping[str, Setting] = field(default_factory=dict)
    left_out: Mapping[str, float] = field(default_factory=dict)

    def of(self, expert: str | None, pattern: str | None) -> Setting:
        """Return the setting of an expert where an exception's pattern matches, or none."""
        if expert is not None and expert in self.left_out:
            return self.left_out[expert]
        return self.setting if pattern is None else self.exceptions[pattern]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One coordinate of a point: which number it is, and its range. Of a binary one counts only which end is nearer.

    shares: how the experts will decide the start; None where it is decided.
    """

    parameter: str
    expert: str | None
    group: str | None
    low: float
    high: float
    start: float
    shares: ShareOptions | None = None
    is_binary: bool = False

    @property
    def name(self) -> str:
        """For example ``coefficient rot90/layer3``; experts and groups that share the number are left out."""
        place = "/".join(part for part in (self.expert, self.group) if part is not None)
        return f"{self.parameter} {place}".rstrip()

    @property
    def start_coordinate(self) -> float:
        """The start, in [0, 1]."""
        return (self.start - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A number that is not searched because an earlier stage has found it."""

    parameter: str
    expert: str | None
    group: str | None
    number: float


@dataclass(frozen=True, slots=True)
class _LinearMap:
    """A parameter's numbers (K, G) = fixed + A numbers: A (K*G, D) by its entries, kept to the operator's range."""

    spec: ParameterSpec
    fixed_KG: Floats
    rows_E: Items
    columns_E: Items
    weights_E: Floats

    @classmethod
    def of(cls, spec: ParameterSpec, fixed_KG: Floats, entries: Sequence[tuple[int, int, float]]) -> "_LinearMap":
        rows_E, columns_E, weights_E = zip(*entries, strict=True) if entries else ((), (), ())
        return cls(
            spec, fixed_KG, np.array(rows_E, dtype=np.int64), np.array(columns_E, dtype=np.int64), np.array(weights_E)
        )

    def values(self, numbers_D: Floats) -> Floats:
        moved = np.bincount(self.rows_E, self.weights_E * numbers_D[self.columns_E], minlength=self.fixed_KG.size)
        # Rounding must not carry an interpolated number out of the range in which the operator is defined.
        return np.clip(self.fixed_KG + moved.reshape(self.fixed_KG.shape), self.spec.minimum, self.spec.maximum)

    def solve(self, values_KG: Floats, sizes_G: Floats, numbers_D: Floats) -> None:
        """Move the parameter's numbers to where its values come closest to those given, by least squares over elements.

        What the values do not determine, such as one of two knots around a single group, moves as little as possible.
        """
        wanted_R = (values_KG - self.fixed_KG).ravel()
        is_own_E = (np.bincount(self.rows_E)[self.rows_E] == 1) & (np.bincount(self.columns_E)[self.columns_E] == 1)
        numbers_D[self.columns_E[is_own_E]] = wanted_R[self.rows_E[is_own_E]]  # their weights are 1
        rows_R, at_R = np.unique(self.rows_E[~is_own_E], return_inverse=True)
        columns_C, at_C = np.unique(self.columns_E[~is_own_E], return_inverse=True)
        map_RC = np.zeros((len(rows_R), len(columns_C)))
        map_RC[at_R, at_C] = self.weights_E[~is_own_E]
        missing_R = wanted_R[rows_R] - map_RC @ numbers_D[columns_C]
        roots_R = np.sqrt(sizes_G[rows_R % len(sizes_G)])
        numbers_D[columns_C] += np.linalg.lstsq(roots_R[:, None] * map_RC, roots_R * missing_R)[0]

    def pull_back(self, gradient_KG: Floats, num_dimensions: int) -> Floats:
        moved_E = self.weights_E * gradient_KG.ravel()[self.rows_E]
        return np.asarray(np.bincount(self.columns_E, moved_E, minlength=num_dimensions), dtype=np.float64)


class Space:
    """Point <-> parameter values over experts and groups.

    Raises: CampaignError for a range outside the operator's, an exception that matches nothing, numbers over depth for
    a group that is not at one depth, or a knot that no group is near.
    """

    def __init__(self, experts: Sequence[str], groups: Groups, depths: Depths, parameters: Sequence[Searched]) -> None:
        self.experts, self.groups, self._depths = tuple(experts), tuple(groups), depths
        dimensions: list[Dimension] = []
        kept: list[Kept] = []
        self._maps = {parameter.spec.name: self._lay_out(parameter, dimensions, kept) for parameter in parameters}
        self.dimensions, self.kept = tuple(dimensions), tuple(kept)
        self._low_D = np.array([dimension.low for dimension in dimensions])
        self.spans_D: Floats = np.array([dimension.high - dimension.low for dimension in dimensions])

    def __len__(self) -> int:
        return len(self.dimensions)

    def values(self, point_D: Sequence[float] | Floats) -> dict[str, Floats]:
        """Return parameter -> (K, G) numbers (or (1, G)); affine in the point."""
        if np.shape(point_D) != (len(self),):
            raise ValueError(f"point: expected {len(self)} coordinates, got shape {np.shape(point_D)}")
        numbers_D = self._low_D + np.asarray(point_D, dtype=np.float64) * self.spans_D
        return {name: linear.values(numbers_D) for name, linear in self._maps.items()}

    def nearest(self, values: Mapping[str, Floats], sizes_G: Floats) -> Floats:
        """Return the point (D,) whose values come closest to those given (least squares over elements), in the box.

        What lies outside is moved to the bounds. sizes_G: how many elements each group has.
        """
        numbers_D = np.array([dimension.start for dimension in self.dimensions])
        for name, linear in self._maps.items():
            linear.solve(values[name], sizes_G, numbers_D)
        return np.asarray(np.clip((numbers_D - self._low_D) / self.spans_D, 0.0, 1.0))

    def pull_back(self, gradients: Mapping[str, Floats]) -> Floats:
        """Return the gradient (D,) in the searched numbers' own units, from gradients in the (K, G) numbers."""
        gradient_D = np.zeros(len(self))
        for name, gradient_KG in gradients.items():
            gradient_D += self._maps[name].pull_back(gradient_KG, len(self))
        return gradient_D

    def with_starts(self, sizes: Sizes) -> "Space":
        """Return the space with the starts that are the experts' shares; one outside its range is moved to the bound.

        What a number moves counts by how much it moves it: one for several groups has the sizes of all their entries.
        """
        space = copy(self)
        space.dimensions = tuple(self._with_start(column, sizes) for column in range(len(self)))
        return space

    def _with_start(self, column: int, sizes: Sizes) -> Dimension:
        dimension, options = self.dimensions[column], self.dimensions[column].shares
        if options is None:
            return dimension
        assert dimension.expert is not None, "a number of the whole merge is no expert's share"
        if isinstance(options.by, str):
            linear = self._maps[dimension.parameter]
            moved_E = linear.columns_E == column
            groups_E = linear.rows_E[moved_E] % len(self.groups)
            sizes_K = sizes(options.by)[:, groups_E] @ linear.weights_E[moved_E]
        else:
            sizes_K = np.array([options.by[expert] for expert in self.experts])
        share = float(shares(sizes_K, options)[self.experts.index(dimension.expert)])
        return replace(dimension, start=min(max(share, dimension.low), dimension.high), shares=None)

    def _lay_out(self, parameter: Searched, dimensions: list[Dimension], kept: list[Kept]) -> _LinearMap:
        """Append the parameter's dimensions and what it keeps, and say how its numbers follow from the dimensions."""
        spec, where = parameter.spec, f"space: {parameter.spec.name}"
        for setting in (parameter.setting, *parameter.exceptions.values()):
            check_setting(spec, setting, where)
        rows: Sequence[str | None] = self.experts if spec.per_expert else (None,)
        fixed_KG = np.zeros((len(rows), len(self.groups)))
        entries: list[tuple[int, int, float]] = []
        begin, used = len(dimensions), set()
        for k, expert in enumerate(rows):
            first_of: dict[str | None, int] = {}  # pattern -> the first of the knots that its groups share
            for g, group in enumerate(self.groups):
                pattern = first_match(parameter.exceptions, f"{expert or '*'}/{group}")
                used.add(pattern)
                setting = parameter.of(expert, pattern)
                if isinstance(setting, np.ndarray):
                    fixed_KG[k, g] = setting[k, g]
                    place = group if len(self.groups) > 1 else None
                    kept.append(Kept(parameter=spec.name, expert=expert, group=place, number=float(setting[k, g])))
                    continue
                if not isinstance(setting, Range):
                    fixed_KG[k, g] = at_depth(setting, group, self._depths, where)
                    continue
                if setting.knots is None or pattern not in first_of:
                    first_of[pattern] = len(dimensions)
                    dimensions.extend(self._dimensions(spec, setting, expert, group, pattern))
                for n, weight in enumerate(knot_weights(setting.knots or 1, group, self._depths, where)):
                    if weight:
                        entries.append((k * len(self.groups) + g, first_of[pattern] + n, weight))
        self._require_matches([pattern for pattern in parameter.exceptions if pattern not in used], rows, where)
        if idle := set(range(begin, len(dimensions))) - {column for _, column, _ in entries}:
            raise CampaignError(f"{where}: no group lies near the knot {dimensions[min(idle)].name!r}; use fewer knots")
        return _LinearMap.of(spec, fixed_KG, entries)

    def _require_matches(self, unused: Sequence[str], rows: Sequence[str | None], where: str) -> None:
        if unused:
            known = [f"{expert or '*'}/{group}" for expert in rows for group in self.groups]
            raise CampaignError(f"{where}: no expert/group matches {unused[0]!r}{did_you_mean(unused[0], known)}")

    def _dimensions(
        self, spec: ParameterSpec, setting: Range, expert: str | None, group: str, pattern: str | None
    ) -> list[Dimension]:
        """Return the dimension of a group, or those of the knots that the groups of a pattern share."""
        share = pattern.split("/", 1)[-1] if pattern is not None else None
        if setting.knots is None:
            places = [group if len(self.groups) > 1 else None]
        elif setting.knots == 1:
            places = [share]
        else:
            depths = [f"depth {depth:.3g}" for depth in np.linspace(0.0, 1.0, setting.knots)]
            places = [depth if share is None else f"{share} {depth}" for depth in depths]
        return [
            Dimension(
                parameter=spec.name, expert=expert, group=place,
                low=setting.low, high=setting.high, start=setting.start, shares=setting.shares,
            )
            for place in places
        ]  # fmt: skip


def at_depth(fixed: float | tuple[float, ...], group: str, depths: Depths, where: str) -> float:
    """Return a fixed number, or a list's at the group's depth. Raises: CampaignError."""
    numbers_N = np.atleast_1d(fixed)
    number = knot_weights(len(numbers_N), group, depths, where) @ numbers_N
    return float(np.clip(number, numbers_N.min(), numbers_N.max()))  # rounding must not carry it past its neighbours


def check_setting(spec: ParameterSpec, setting: Setting, where: str) -> None:
    """Raise CampaignError if a number is outside the operator's range, or a range is none."""
    match setting:
        case Range():
            numbers: tuple[float, ...] = (setting.low, setting.high, setting.start)
        case tuple():
            numbers = setting
        case np.ndarray():
            numbers = tuple(setting.ravel().tolist())
        case _:
            numbers = (setting,)
    for number in numbers:
        if not spec.minimum <= number <= spec.maximum:
            raise CampaignError(f"{where}: expected a number in [{spec.minimum:g}, {spec.maximum:g}], found {number:g}")
    if isinstance(setting, Range) and not setting.low <= setting.start <= setting.high:
        raise CampaignError(
            f"{where}: expected low <= start <= high, "
            f"found low {setting.low:g}, start {setting.start:g}, high {setting.high:g}"
        )
    if isinstance(setting, Range) and setting.low == setting.high:
        raise CampaignError(f"{where}: low and high are both {setting.low:g}; give one number to fix it")
