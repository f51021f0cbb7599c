"""The numbers of a recipe tensor by tensor, and in other groups than its own.

Shape letters: K experts (1 for a parameter of the whole merge), G groups, T tensors.
"""

from collections.abc import Mapping

import numpy as np

from evomerge.records import Floats, Recipe, TensorIndex
from evomerge.space.groups import Groups


def by_tensor(recipe: Recipe, tensors: TensorIndex) -> dict[str, Floats]:
    """Return parameter -> (K, T) numbers, those of each tensor's group."""
    place_of = {name: g for g, members in enumerate(recipe.groups.values()) for name in members}
    places_T = np.array([place_of[tensor.name] for tensor in tensors])
    return {name: np.array(matrix)[:, places_T] for name, matrix in recipe.values.items()}


def regrouped(recipe: Recipe, groups: Groups, tensors: TensorIndex) -> dict[str, Floats]:
    """Return parameter -> (K, G) numbers in other groups: a group's is the mean over its tensors' elements.

    Groups that lie within one group of the recipe have that group's number exactly.
    """
    column_of = {tensor.name: t for t, tensor in enumerate(tensors)}
    sizes_T = np.array([tensor.num_elements for tensor in tensors])
    columns = [[column_of[name] for name in members] for members in groups.values()]
    return {
        name: np.stack([_mean(matrix_KT[:, of_group], sizes_T[of_group]) for of_group in columns], axis=1)
        for name, matrix_KT in by_tensor(recipe, tensors).items()
    }


def group_sizes(groups: Groups, tensors: TensorIndex) -> Floats:
    """Return the number of elements of each group, (G,)."""
    size_of: Mapping[str, int] = {tensor.name: tensor.num_elements for tensor in tensors}
    return np.array([sum(size_of[name] for name in members) for members in groups.values()], dtype=np.float64)


def _mean(numbers_KT: Floats, sizes_T: Floats) -> Floats:
    """Return the means (K,) weighted by size; rounding must not carry that of equal numbers away from them."""
    means_K = np.average(numbers_KT, axis=1, weights=sizes_T)
    return np.asarray(np.clip(means_K, numbers_KT.min(axis=1), numbers_KT.max(axis=1)))
