"""Depth: where a group lies in the network, and numbers that are interpolated over it.

Depth runs from 0, the first block, to 1, the last: block / (number of blocks - 1), in every tower (encoder, decoder) by
itself. Tensors before the first block are at 0; tensors in no block that come after it (also between two towers) at 1.

Shape letters: N knots.
"""

from collections.abc import Mapping

import numpy as np

from evomerge.errors import CampaignError
from evomerge.records import Floats, TensorIndex
from evomerge.space.groups import Groups, blocks

Depths = Mapping[str, float]
"""Group -> depth in [0, 1]; groups whose tensors lie at several depths are left out."""


def group_depths(tensors: TensorIndex, groups: Groups) -> dict[str, float]:
    """Return the depth of each group that lies at one; a model without blocks has no depth at all."""
    names = [tensor.name for tensor in tensors]
    found = blocks(names)
    last: dict[str, int] = {}
    for tower, number in filter(None, found):
        last[tower] = max(number, last.get(tower, 0))
    if not last:
        return {}
    depth_of, outside = {}, 0.0
    for name, block in zip(names, found, strict=True):
        if block is None:
            depth_of[name] = outside
        else:
            outside = 1.0
            depth_of[name] = block[1] / max(1, last[block[0]])
    depths = {group: {depth_of[name] for name in members} for group, members in groups.items()}
    return {group: found.pop() for group, found in depths.items() if len(found) == 1}


def knot_weights(num_knots: int, group: str, depths: Depths, where: str) -> Floats:
    """Return what N evenly spaced knots weigh at a group's depth, shape (N,): straight lines between, summing to 1.

    One knot weighs 1 everywhere. Raises: CampaignError if there are several and the group is not at one depth.
    """
    if num_knots == 1:
        return np.ones(1)
    if group not in depths:
        raise CampaignError(
            f"{where}: group {group!r} is not at one depth of the network; knots and lists over depth need "
            "groups: layer, module or tensor, or a number of its own for this group"
        )
    knots_N = np.linspace(0.0, 1.0, num_knots)
    return np.array([np.interp(depths[group], knots_N, hat_N) for hat_N in np.eye(num_knots)])
