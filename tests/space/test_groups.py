"""Groups: every tensor is in exactly one, and what cannot be meant is refused."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import CampaignError
from evomerge.records import TensorIndex, TensorInfo
from evomerge.space.groups import Groups, block_modules, make_groups


def index(*names: str) -> TensorIndex:
    return tuple(TensorInfo(name, (2, 3)) for name in names)


LLAMA = index(
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(11)
        for name in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
)
VIT = index(
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    *(
        f"encoder.layer.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            "attention.attention.query",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
            "layernorm_before",
        )
    ),
    "layernorm.weight",
    "pooler.dense.weight",
)
T5 = index(
    "shared.weight",
    *(f"encoder.block.{layer}.layer.0.SelfAttention.q.weight" for layer in range(2)),
    "encoder.final_layer_norm.weight",
    *(f"decoder.block.{layer}.layer.1.DenseReluDense.wi.weight" for layer in range(2)),
    "decoder.final_layer_norm.weight",
    "lm_head.weight",
)
GPT2 = index(
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.h.0.ln_1.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.mlp.c_fc.weight",
    "transformer.ln_f.weight",
)


def assert_partition(groups: Groups, tensors: TensorIndex) -> None:
    members = [name for group in groups.values() for name in group]
    assert sorted(members) == sorted(tensor.name for tensor in tensors)
    assert all(groups.values())


@pytest.mark.parametrize("tensors", [LLAMA, VIT, T5, GPT2])
@pytest.mark.parametrize("grouping", ["model", "layer", "module", "tensor"])
def test_every_tensor_is_in_exactly_one_group(tensors: TensorIndex, grouping: str) -> None:
    assert_partition(make_groups(tensors, grouping), tensors)


def test_model_is_one_group_and_tensor_one_each() -> None:
    assert list(make_groups(LLAMA, "model")) == ["model"]
    assert make_groups(VIT, "tensor") == {tensor.name: (tensor.name,) for tensor in VIT}


def test_layers_of_a_llama() -> None:
    groups = make_groups(LLAMA, "layer")
    assert list(groups) == ["before", *(f"layer{i}" for i in range(11)), "after"]
    assert groups["before"] == ("model.embed_tokens.weight",)
    assert groups["after"] == ("model.norm.weight", "lm_head.weight")
    assert len(groups["layer1"]) == 6
    assert all(name.startswith("model.layers.1.") for name in groups["layer1"])


def test_layers_of_a_vision_transformer() -> None:
    groups = make_groups(VIT, "layer")
    assert list(groups) == ["before", "layer0", "layer1", "after"]
    assert len(groups["before"]) == 3
    assert groups["after"] == ("layernorm.weight", "pooler.dense.weight")


def test_encoder_and_decoder_blocks_are_told_apart() -> None:
    groups = make_groups(T5, "layer")
    blocks = [name for name in groups if name not in ("before", "after")]
    assert len(blocks) == 4
    assert {len(groups[block]) for block in blocks} == {1}
    assert {block.split(".")[0] for block in blocks} == {"encoder", "decoder"}


def test_modules_of_a_llama() -> None:
    groups = make_groups(LLAMA, "module")
    for layer in range(11):
        prefix = f"model.layers.{layer}"
        assert groups[f"layer{layer}.attn"] == (
            f"{prefix}.self_attn.q_proj.weight",
            f"{prefix}.self_attn.o_proj.weight",
        )
        assert groups[f"layer{layer}.mlp"] == (f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.down_proj.weight")
        assert groups[f"layer{layer}.norm"] == (
            f"{prefix}.input_layernorm.weight",
            f"{prefix}.post_attention_layernorm.weight",
        )
    assert groups["before.embed"] == ("model.embed_tokens.weight",)
    assert groups["after.norm"] == ("model.norm.weight",)
    assert groups["after.head"] == ("lm_head.weight",)
    assert len(groups) == 36


def test_modules_of_a_vision_transformer() -> None:
    groups = make_groups(VIT, "module")
    layer = "encoder.layer.1"
    assert groups["layer1.attn"] == (
        f"{layer}.attention.attention.query.weight",
        f"{layer}.attention.output.dense.weight",
    )
    assert groups["layer1.mlp"] == (f"{layer}.intermediate.dense.weight", f"{layer}.output.dense.weight")
    assert groups["layer1.norm"] == (f"{layer}.layernorm_before.weight",)
    assert groups["after.head"] == ("pooler.dense.weight",)


def test_modules_of_a_gpt2() -> None:
    assert {group: len(names) for group, names in make_groups(GPT2, "module").items()} == {
        "before.embed": 2,
        "layer0.norm": 1,
        "layer0.attn": 1,
        "layer0.mlp": 1,
        "after.norm": 1,
    }


def test_patterns_make_a_group_a_block_where_they_say_layer() -> None:
    groups = make_groups(
        LLAMA,
        {"attn": "*layers.{layer}.self_attn.*", "ends": ["*embed_tokens*", "lm_head.weight"], "rest": "*"},
    )
    assert list(groups)[:2] == ["ends", "attn.0"]
    assert groups["attn.10"] == ("model.layers.10.self_attn.q_proj.weight", "model.layers.10.self_attn.o_proj.weight")
    assert groups["ends"] == ("model.embed_tokens.weight", "lm_head.weight")
    assert len(groups["attn.1"]) == 2, "layer 1 must not swallow layer 10"
    assert len(groups["rest"]) == 1 + 11 * 4
    assert_partition(groups, LLAMA)


def test_the_first_pattern_that_matches_takes_the_tensor() -> None:
    one = make_groups(LLAMA, {"norm": "*norm*", "rest": "*"})
    other = make_groups(LLAMA, {"layers": "*layers*", "norm": "*norm*", "rest": "*"})
    assert len(one["norm"]) == 23
    assert other["norm"] == ("model.norm.weight",)


def test_question_mark_is_one_character_and_other_signs_are_themselves() -> None:
    tensors = index("a.1.w", "a.12.w", "a[1].w")
    assert make_groups(tensors, {"one": "a.?.w", "brackets": "a[1].w", "rest": "*"})["one"] == ("a.1.w",)
    assert make_groups(tensors, {"brackets": "a[1].w", "rest": "*"})["brackets"] == ("a[1].w",)


def test_a_pattern_matches_the_whole_name() -> None:
    tensors = index("head.weight", "head.weight_scale", "my.head.weight")
    assert make_groups(tensors, {"head": "head.weight", "rest": "*"})["head"] == ("head.weight",)


@pytest.mark.parametrize(
    ("grouping", "words"),
    [
        ({"attn": "*self_attn*"}, ["47 tensors match no pattern", "model.embed_tokens.weight", 'rest: "*"']),
        ({"rest": "*", "router": "*router*"}, ["no tensor is left for router"]),
        ({"everything": "*", "attn": "*self_attn*"}, ["no tensor is left for attn"]),
        ({"attn": "*.{layer}.self_attn.{layer}.*", "rest": "*"}, ["2 {layer}", "one at most"]),
    ],
)
def test_what_cannot_be_meant_is_refused(grouping: Mapping[str, str | Sequence[str]], words: list[str]) -> None:
    with pytest.raises(CampaignError) as caught:
        make_groups(LLAMA, grouping)
    for word in words:
        assert word in str(caught.value)


names = st.builds(
    "{}{}.{}.{}.w".format,
    st.sampled_from(["", "enc.", "dec."]),
    st.sampled_from(["layers", "h", "block", "cells"]),
    st.integers(0, 30),
    st.sampled_from(["attn", "mlp", "norm", "x"]),
) | st.sampled_from(["embed.w", "norm.w", "lm_head.w"])


@given(
    st.lists(names, min_size=1, max_size=12, unique=True),
    st.sampled_from(["model", "layer", "module", "tensor", {"all": "*"}]),
)
def test_any_names_are_partitioned(names: list[str], grouping: str | Mapping[str, str]) -> None:
    assert_partition(make_groups(index(*names), grouping), index(*names))


def test_blocks_are_modules_of_each_tower() -> None:
    names = ["encoder.block.0.q.weight", "encoder.block.1.q.weight", "decoder.block.1.q.weight", "decoder.block.1.norm"]
    assert block_modules([*names, "shared.weight"]) == {
        0: ["encoder.block.0"],
        1: ["encoder.block.1", "decoder.block.1"],
    }
