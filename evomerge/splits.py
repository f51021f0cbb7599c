"""Splits: adapt items train, search items steer, test items are touched once.

Splits are made by source item: what comes from one source (one image seen by eight tasks, one file cut into pieces) is
in one split only, for all tasks.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.errors import DataError
from evomerge.records import Items, Split

SPLITS: tuple[Split, ...] = ("adapt", "search", "test")

TaskSplits = dict[str, dict[Split, Items]]
"""Task -> split -> indices of its items, ascending."""


def split_items(sources: Mapping[str, Sequence[int | str]], shares: Mapping[Split, float], seed: int) -> TaskSplits:
    """Divide every task's items by source.

    sources maps a task to the source of each of its items; shares sum to 1. The sources of all tasks together are
    shuffled by ``seed`` and cut by the shares, so the numbers of a task's items meet them only nearly.
    Raises: DataError if a task is left without search or test items, or with those of one source (no standard error).
    """
    known = sorted({str(source) for task in sources.values() for source in task})
    order = np.random.default_rng([seed, 0x5917]).permutation(len(known))
    cuts = np.cumsum([round(shares[split] * len(known)) for split in SPLITS[:2]])
    home = {known[i]: split for split, part in zip(SPLITS, np.split(order, cuts), strict=True) for i in part}
    splits: TaskSplits = {}
    for task, of_items in sources.items():
        homes = np.array([home[str(source)] for source in of_items])
        splits[task] = {split: np.flatnonzero(homes == split) for split in SPLITS}
        for split in SPLITS:
            held = splits[task][split]
            if shares[split] > 0 and len({str(of_items[item]) for item in held}) < 2:
                raise DataError(
                    f"task {task}: the {split} split holds {len(held)} of {len(homes)} items, expected at least 2 of "
                    "different sources; give it a larger share or more items"
                )
    return splits
