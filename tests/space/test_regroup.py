"""Numbers of a recipe in other groups."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evomerge.records import Recipe, TensorInfo
from evomerge.space.groups import make_groups
from evomerge.space.regroup import by_tensor, group_sizes, regrouped

TENSORS = tuple(
    TensorInfo(name, shape)
    for name, shape in (
        ("embed.weight", (7, 3)),
        ("layers.0.attn.weight", (3, 3)),
        ("layers.0.mlp.weight", (5, 3)),
        ("layers.1.attn.weight", (3, 3)),
        ("layers.1.mlp.weight", (5, 3)),
        ("head.bias", (7,)),
    )
)
COARSER = ("model", "layer", "module", "tensor")


def recipe(grouping: str, values: dict[str, np.ndarray]) -> Recipe:
    return Recipe(
        operator="ties",
        options={},
        base="base",
        experts={"one": "one", "two": "two"},
        dtype="float32",
        groups=make_groups(TENSORS, grouping),  # type: ignore[arg-type]
        values={name: tuple(map(tuple, matrix.tolist())) for name, matrix in values.items()},
    )


def drawn(grouping: str, seed: int) -> Recipe:
    num_groups, rng = len(make_groups(TENSORS, grouping)), np.random.default_rng(seed)  # type: ignore[arg-type]
    return recipe(
        grouping, {"coefficient": rng.normal(size=(2, num_groups)), "scale": rng.normal(size=(1, num_groups))}
    )


@given(st.sampled_from(COARSER), st.sampled_from(COARSER), st.integers(0, 2**31))
def test_finer_groups_make_the_same_merge_to_the_last_bit(one: str, other: str, seed: int) -> None:
    coarse, fine = sorted((one, other), key=COARSER.index)
    before = drawn(coarse, seed)
    groups = make_groups(TENSORS, fine)  # type: ignore[arg-type]
    values = {name: tuple(map(tuple, matrix.tolist())) for name, matrix in regrouped(before, groups, TENSORS).items()}
    after = replace(before, groups=groups, values=values)
    for name, matrix in by_tensor(before, TENSORS).items():
        assert (by_tensor(after, TENSORS)[name] == matrix).all()


def test_a_coarser_group_has_the_mean_over_elements() -> None:
    numbers = np.array([[0.0, 0.3, 0.9, 1.0, 0.5, 0.2], [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]])
    before = recipe("tensor", {"coefficient": numbers, "scale": np.ones((1, 6))})
    values = regrouped(before, make_groups(TENSORS, "layer"), TENSORS)
    assert values["coefficient"].shape == (2, 4)
    np.testing.assert_allclose(values["coefficient"][0], [0.0, (9 * 0.3 + 15 * 0.9) / 24, (9 + 15 * 0.5) / 24, 0.2])
    np.testing.assert_allclose(values["coefficient"][1], [1.0, 0.0, 9 / 24, 1.0])
    assert (values["scale"] == 1.0).all()
    whole = regrouped(before, make_groups(TENSORS, "model"), TENSORS)["coefficient"]
    sizes = np.array([tensor.num_elements for tensor in TENSORS])
    np.testing.assert_allclose(whole[:, 0], numbers @ sizes / sizes.sum())


def test_sizes_count_elements() -> None:
    assert group_sizes(make_groups(TENSORS, "layer"), TENSORS).tolist() == [21.0, 24.0, 24.0, 7.0]
