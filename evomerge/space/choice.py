"""The choice of the operator: one point, which says by which operator, and with which numbers of its.

Shape letters: D dimensions of the choice, d those of one operator's space, O operators.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.records import Floats, Items
from evomerge.space.space import Dimension, Sizes, Space

COEFFICIENT = "coefficient"  # a merge has the same experts and groups, whatever the operator


def is_coefficient(parameter: str) -> bool:
    """Whether a parameter weighs an expert: ``coefficient``, or of several classes ``coefficient2`` and so on."""
    return parameter.rstrip("0123456789") == COEFFICIENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One operator, its space, and which coordinates of the choice's point are the space's."""

    operator: str
    space: Space
    columns_d: Items


class Choice:
    """Spaces of several operators behind one point in [0, 1]^D, or the one space of one operator, unchanged.

    With several, the first dimension is ``operator``: its [0, 1] is cut into O equal bins, and it starts in the middle
    of the first. Coefficients that bear the same name are one coordinate, scaled into each operator's own range; it
    starts, and ``dimensions`` shows it, as the first operator has it. Every other number is one operator's own, and is
    named after it, such as ``ties.density``.
    """

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        dimensions: list[Dimension] = []
        if len(spaces) > 1:
            middle = 0.5 / len(spaces)
            dimensions.append(Dimension(parameter="operator", expert=None, group=None, low=0.0, high=1.0, start=middle))
        branches: list[Branch] = []
        column_of: dict[str, int] = {}
        for operator, space in spaces.items():
            columns = []
            for own in space.dimensions:
                is_shared = len(spaces) == 1 or is_coefficient(own.parameter)
                dimension = own if is_shared else replace(own, parameter=f"{operator}.{own.parameter}")
                column = column_of.setdefault(dimension.name, len(dimensions))
                if column == len(dimensions):
                    dimensions.append(dimension)
                columns.append(column)
            branches.append(Branch(operator=operator, space=space, columns_d=np.array(columns, dtype=np.int64)))
        self.branches, self.dimensions = tuple(branches), tuple(dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def start(self) -> Floats:
        """The point of all starts, shape (D,)."""
        return np.array([dimension.start_coordinate for dimension in self.dimensions])

    @property
    def starts(self) -> list[Floats]:
        """The point of all starts of every operator in turn."""
        points = [self.start for _ in self.branches]
        for place, point_D in enumerate(points if len(points) > 1 else ()):
            point_D[0] = (place + 0.5) / len(points)
        return points

    def with_starts(self, sizes: Sizes) -> "Choice":
        """Return the choice with the starts that are the experts' shares."""
        return Choice({branch.operator: branch.space.with_starts(sizes) for branch in self.branches})

    def branch(self, point_D: Sequence[float] | Floats) -> Branch:
        """Return the branch of the operator that a point chooses."""
        return self.branches[chosen(point_D, len(self.branches))]

    def nearest(self, operator: str, values: Mapping[str, Floats], sizes_G: Floats) -> Floats:
        """Return the point (D,) that chooses an operator and comes closest to values of its, as ``Space.nearest`` does.

        The numbers that the operator does not read stay at their start.
        """
        place = [branch.operator for branch in self.branches].index(operator)
        point_D, branch = self.starts[place], self.branches[place]
        point_D[branch.columns_d] = branch.space.nearest(values, sizes_G)
        return point_D


def chosen(point_D: Sequence[float] | Floats, num_operators: int) -> int:
    """Return which of the operators a point chooses: by its first coordinate, where there are several."""
    return min(int(point_D[0] * num_operators), num_operators - 1) if num_operators > 1 else 0
