"""Depth: where the groups of real models lie in the network."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_groups import LLAMA, T5, VIT, index

from evomerge.errors import CampaignError
from evomerge.space.depth import group_depths, knot_weights
from evomerge.space.groups import make_groups


def test_layers_lie_between_the_first_block_and_the_last() -> None:
    depths = group_depths(LLAMA, make_groups(LLAMA, "layer"))
    assert depths == {"before": 0.0, **{f"layer{layer}": layer / 10 for layer in range(11)}, "after": 1.0}


def test_modules_and_tensors_lie_where_their_layer_does() -> None:
    modules = group_depths(LLAMA, make_groups(LLAMA, "module"))
    assert {modules[f"layer3.{kind}"] for kind in ("attn", "mlp", "norm")} == {0.3}
    assert modules["before.embed"] == 0.0
    assert modules["after.head"] == 1.0
    tensors = group_depths(VIT, make_groups(VIT, "tensor"))
    assert tensors["embeddings.cls_token"] == tensors["encoder.layer.0.output.dense.weight"] == 0.0
    assert tensors["encoder.layer.1.output.dense.weight"] == tensors["pooler.dense.weight"] == 1.0


def test_every_tower_has_its_own_depth() -> None:
    depths = group_depths(T5, make_groups(T5, "layer"))
    for tower in ("encoder", "decoder"):
        assert [depths[f"{tower}.layer{layer}"] for layer in range(2)] == [0.0, 1.0]
    assert (depths["before"], depths["after"]) == (0.0, 1.0)


def test_groups_over_several_depths_have_none() -> None:
    groups = make_groups(LLAMA, {"attn": "*layers.{layer}.self_attn.*", "norm": "*norm*", "head": "lm*", "rest": "*"})
    depths = group_depths(LLAMA, groups)
    assert depths == {**{f"attn.{layer}": layer / 10 for layer in range(11)}, "head": 1.0}
    assert group_depths(LLAMA, make_groups(LLAMA, "model")) == {}


def test_models_with_one_block_and_with_none() -> None:
    one = index("embed.w", "layers.0.a.w", "head.w")
    assert group_depths(one, make_groups(one, "layer")) == {"before": 0.0, "layer0": 0.0, "after": 1.0}
    none = index("embed.w", "head.w")
    assert group_depths(none, make_groups(none, "tensor")) == {}


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_weights_interpolate_as_numpy_does(num_knots: int, depth: float, seed: int) -> None:
    weights = knot_weights(num_knots, "here", {"here": depth}, "x")
    numbers = np.random.default_rng(seed).normal(size=num_knots)
    assert weights.shape == (num_knots,)
    assert (weights >= 0).all()
    assert (weights > 0).sum() <= 2
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert weights @ numbers == pytest.approx(np.interp(depth, np.linspace(0, 1, num_knots), numbers), abs=1e-12)


def test_one_knot_needs_no_depth_and_two_do() -> None:
    assert knot_weights(1, "model", {}, "x").tolist() == [1.0]
    with pytest.raises(CampaignError, match="x: group 'model' is not at one depth of the network"):
        knot_weights(2, "model", {}, "x")
