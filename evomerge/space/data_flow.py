"""The data-flow space: layers of several experts in one sequence, chosen, repeated and scaled; no weight is merged.

All layers of all experts, in the order of the file, stand in a row, several times over. A point says of each position
whether its layer is on, and by how much what flows into it is scaled. The first expert leads: embeddings, last norm and
head are its own, and the search starts at its own layers. Where weights have been merged before, the best merge leads.
References: Akiba et al. 2024, arxiv.org/abs/2403.13187, section "merging in the data flow space"; one scale a position,
which counts only where the layer is on, in place of their matrix of scales between all pairs of layers.

Shape letters: D dimensions, T positions, L layers of a path.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.records import Floats, Items, ParameterSpec
from evomerge.space.space import Dimension, Range

ON, OFF = 0.75, 0.25
"""Coordinates at which a layer starts: one flips now and then where a search spreads its first points by 0.15."""

SCALE = ParameterSpec(
    name="scale", meaning="factor on what a layer reads", default=1.0, low=0.5, high=1.5, minimum=1e-3, maximum=1e3
)


@dataclass(frozen=True, slots=True)
class PathLayer:
    """One layer of a path: which layer of which expert, and the gain on what it writes into the residual stream."""

    expert: int
    layer: int
    gain: float


Path = tuple[PathLayer, ...]


class DataFlow:
    """Point <-> path. Position t = (repeat * K + expert) * depth + layer has the coordinates t (on) and T + t (scale).

    scale: the range of the scales, or one number for all of them, which is then no dimension. left_out: experts that
    have no layers in the row; the first is none of them. own_layers: the path of the first expert's, unscaled.
    """

    def __init__(
        self,
        experts: Sequence[str],
        depth: int,
        *,
        repeats: int,
        max_layers: int | None,
        scale: Range | float,
        left_out: Collection[str] = (),
    ) -> None:
        row = [(e, layer) for e, name in enumerate(experts) if name not in left_out for layer in range(depth)]
        places = [(e, layer, r) for r in range(repeats) for e, layer in row]
        self.own_layers: Path = tuple(PathLayer(0, layer, 1.0) for layer in range(depth))
        self._places = [(e, layer) for e, layer, _ in places]
        self._max_layers = max_layers
        self._fixed_scale = None if isinstance(scale, Range) else scale
        names = [f"layer{layer}" + (f" pass {r + 1}" if repeats > 1 else "") for _, layer, r in places]
        dimensions = [
            Dimension(
                parameter="on", expert=experts[e], group=name, low=0.0, high=1.0,
                start=ON if t < depth else OFF, is_binary=True,
            )
            for t, ((e, _), name) in enumerate(zip(self._places, names, strict=True))
        ]  # fmt: skip
        if isinstance(scale, Range):
            dimensions += [
                Dimension(
                    parameter="scale", expert=experts[e], group=name,
                    low=scale.low, high=scale.high, start=scale.start,
                )
                for (e, _), name in zip(self._places, names, strict=True)
            ]  # fmt: skip
        self.dimensions = tuple(dimensions)
        self._low_D = np.array([dimension.low for dimension in dimensions])
        self._spans_D = np.array([dimension.high - dimension.low for dimension in dimensions])

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def starts(self) -> list[Floats]:
        """The one start (D,): the first expert's own layers, once."""
        return [np.array([dimension.start_coordinate for dimension in self.dimensions])]

    def path(self, point_D: Sequence[float] | Floats) -> Path:
        """Return the layers that are on, in their order, with their gains."""
        if np.shape(point_D) != (len(self),):
            raise ValueError(f"point: expected {len(self)} coordinates, got shape {np.shape(point_D)}")
        numbers_D = self._low_D + np.asarray(point_D, dtype=np.float64) * self._spans_D
        chosen_L = layers_on(numbers_D[: len(self._places)], self._max_layers)
        if self._fixed_scale is None:
            scales_L = numbers_D[len(self._places) + chosen_L]
        else:
            scales_L = np.full(len(chosen_L), self._fixed_scale)
        chosen = [self._places[t] for t in chosen_L]
        return tuple(
            PathLayer(expert, layer, gain)
            for (expert, layer), gain in zip(chosen, gains(scales_L).tolist(), strict=True)
        )

    def nearest(self, path: Path) -> Floats:
        """Return a point (D,) of a path: every layer at the first position where it can stand.

        A layer that the row has no position for is left out, and a scale outside the range is moved to the bound.
        """
        point_D = self.starts[0]
        point_D[: len(self._places)] = OFF
        first, before = 0, 1.0
        for step in path:
            if (step.expert, step.layer) not in self._places[first:]:
                continue
            t = self._places.index((step.expert, step.layer), first)
            point_D[t] = ON
            if self._fixed_scale is None:
                column = len(self._places) + t
                scale = (before / step.gain - self._low_D[column]) / self._spans_D[column]
                point_D[column] = min(max(scale, 0.0), 1.0)
            first, before = t + 1, step.gain
        return point_D


def layers_on(on_T: Sequence[float] | Floats, max_layers: int | None) -> Items:
    """Return the positions (L,) of layers that are on, in their order, by their coordinates in [0, 1].

    On is what is above 0.5: at least the one, and at most the ``max_layers``, with the largest coordinates (of equal
    ones the earlier).
    """
    on_T = np.asarray(on_T)
    num_layers = min(max(1, int((on_T > 0.5).sum())), max_layers or len(on_T))
    return np.sort(np.argsort(-on_T, kind="stable")[:num_layers])


def gains(scales_L: Floats) -> Floats:
    """Return by what each layer's output is multiplied so that no input needs a scale, (L,).

    Layer l reads W_l h and adds to it: h <- W_l h + f(W_l h). Where a layer norms what it reads, f does not see the
    scale, and h divided by the product of all scales up to there is a stream to which layer l adds
    f / (W_1 ... W_l) and in which the embeddings keep their size. The last norm does not see the difference. What norms
    add to the mean square of their input (eps) counts beside this stream, where the scaled one is W_1 ... W_l times it.
    """
    return np.asarray(1.0 / np.cumprod(scales_L), dtype=np.float64)
