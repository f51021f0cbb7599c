"""What a mergekit file says at each tensor, against numbers worked out by hand; and what it is told it cannot say."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evomerge.campaign.recipe_file import ReadRecipe
from evomerge.errors import InputError
from evomerge.interop.read import read_any_recipe, read_mergekit
from evomerge.interop.write import mergekit_data

Write = Callable[..., Path]
BASE, V1, V2, V3 = (f"inputs/{name}" for name in ("base", "v1", "v2", "v3"))


def at(read: ReadRecipe, parameter: str, tensor: str) -> tuple[float, ...]:
    """A parameter's numbers at one tensor: one an expert, or one."""
    g = next(g for g, names in enumerate(read.recipe.groups.values()) if tensor in names)
    return tuple(row[g] for row in read.recipe.values[parameter])


def q_proj(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def up_proj(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def ties(**changes: Any) -> dict[str, Any]:
    sections = {
        "merge_method": "ties",
        "base_model": BASE,
        "models": [{"model": V1, "parameters": {"weight": 1.0}}, {"model": V2, "parameters": {"weight": 0.5}}],
    }
    return {key: value for key, value in (sections | changes).items() if value is not None}


def weights(first: Any, second: Any = 0.5) -> list[dict[str, Any]]:
    return [{"model": V1, "parameters": {"weight": first}}, {"model": V2, "parameters": {"weight": second}}]


def test_a_list_lies_over_the_depth(write: Write) -> None:
    """Four layers at 0, 1/3, 2/3, 1; what lies outside them takes the first entry."""
    read = read_mergekit(write(ties(models=weights([0.0, 0.3, 0.9]))))
    expected = [0.0, 0.2, 0.5, 0.9]  # 2/3 of the way to 0.3; 1/3 of the way from 0.3 to 0.9
    for layer, number in enumerate(expected):
        assert at(read, "coefficient", q_proj(layer)) == pytest.approx((number, 0.5))
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert at(read, "coefficient", outside) == (0.0, 0.5)


def test_the_first_filter_wins_and_the_next_level_is_asked_when_none_does(write: Write) -> None:
    of_model = [{"filter": "mlp", "value": [0.1, 0.4]}, {"filter": "layers.2", "value": 0.7}]
    of_file = [{"filter": "self_attn", "value": 0.2}, {"value": 0.9}]
    read = read_mergekit(
        write(
            ties(
                models=[{"model": V1, "parameters": {"weight": of_model}}, {"model": V2}],
                parameters={"weight": of_file},
            )
        )
    )
    assert at(read, "coefficient", up_proj(0)) == pytest.approx((0.1, 0.9))
    assert at(read, "coefficient", up_proj(2)) == pytest.approx((0.3, 0.9))
    assert at(read, "coefficient", q_proj(2)) == (0.7, 0.2)
    assert at(read, "coefficient", q_proj(1)) == (0.2, 0.2)
    assert at(read, "coefficient", "model.norm.weight") == (0.9, 0.9)


def test_defaults_are_mergekits(write: Write) -> None:
    """Its density is 1, ours 0.2; its linear divides by the sum of the weights, as ours."""
    read = read_mergekit(write(ties()))
    assert at(read, "density", q_proj(0)) == (1.0, 1.0)
    assert at(read, "scale", q_proj(0)) == (1.0,)
    assert read.recipe.options == {"normalize": True, "rescale": False, "election": "sum"}
    assert read.recipe.dtype == "float32"
    assert read.recipe.out_dtype is None


def test_lambda_is_our_scale_or_goes_into_the_coefficients(write: Write) -> None:
    read = read_mergekit(write(ties(parameters={"lambda": [0.5, 2.0]})))
    assert at(read, "scale", q_proj(3)) == (2.0,)
    read = read_mergekit(
        write(
            ties(
                merge_method="task_arithmetic", models=weights(1.0, 3.0), parameters={"lambda": 0.5, "normalize": True}
            )
        )
    )
    assert at(read, "coefficient", q_proj(3)) == (0.125, 0.375)
    read = read_mergekit(
        write(ties(merge_method="task_arithmetic", models=weights(1.0, -1.0), parameters={"normalize": True}))
    )
    assert at(read, "coefficient", q_proj(3)) == (1.0, -1.0)  # a sum of zero is not divided by


def test_slices_are_looked_up_from_the_inside_out(write: Write) -> None:
    def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
        return {"model": model, "layer_range": [first, end], "parameters": parameters}

    read = read_mergekit(
        write(
            {
                "merge_method": "linear",
                "slices": [
                    {"sources": [source(V1, 0, 3, weight=[0.0, 1.0]), source(V2, 0, 3)], "parameters": {"weight": 0.6}},
                    {"sources": [source(V3, 3, 4), source(V1, 3, 4, weight=[5.0, 0.25])]},
                ],
                "parameters": {"weight": 0.9},
            }
        )
    )
    assert list(read.recipe.experts) == ["v1", "v2", "v3"]
    assert read.recipe.layers is None, "every layer is merged from those of its own number"
    expected = [(0.0, 0.6, 0.0), (0.5, 0.6, 0.0), (1.0, 0.6, 0.0), (0.25, 0.0, 0.9)]  # alone in its slice: t = 1
    for layer, numbers in enumerate(expected):
        assert at(read, "coefficient", q_proj(layer)) == pytest.approx(numbers)
    assert at(read, "coefficient", "model.embed_tokens.weight") == (0.0, 0.6, 0.0)
    assert at(read, "coefficient", "lm_head.weight") == (5.0, 0.0, 0.9)


def test_slices_arrange_the_layers(write: Write) -> None:
    def source(model: str, first: int, end: int) -> dict[str, Any]:
        return {"model": model, "layer_range": [first, end]}

    slices = [{"sources": [source(BASE, 0, 2), source(V1, 0, 2)]}, {"sources": [source(V1, 1, 4)]}]
    sections = {"merge_method": "task_arithmetic", "slices": slices, "base_model": BASE, "parameters": {"weight": 0.3}}
    assert read_mergekit(write(sections)).recipe.layers == ((0, 0), (1, 1), (1, 1), (2, 2), (3, 3))
    sections = {
        "merge_method": "passthrough",
        "slices": [{"sources": [source(V1, 1, 3)]}, {"sources": [source(V2, 0, 1)]}],
    }
    assert read_mergekit(write(sections)).recipe.layers == ((None, 1, None), (None, 2, None), (None, None, 0))
    sections = {"merge_method": "passthrough", "slices": [{"sources": [source(V1, 0, 3)]}]}
    assert read_mergekit(write(sections)).recipe.layers == ((None, 0), (None, 1), (None, 2)), "the last layer is gone"


def test_the_slerp_that_everybody_writes(write: Write) -> None:
    """Five values over four layers: layer 1 lies a third of the way from the second value to the third."""
    sources = [{"model": model, "layer_range": [0, 4]} for model in (V1, V2)]
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    sections = {
        "slices": [{"sources": sources}], "merge_method": "slerp", "base_model": V1, "parameters": {"t": t}, "dtype": "bfloat16",
    }  # fmt: skip
    read = read_mergekit(write(sections))
    assert read.recipe.layers is None
    assert list(read.recipe.experts) == ["v2"]
    for layer, number in enumerate((0, 0.5 * 2 / 3 + 0.3 / 3, 0.3 / 3 + 0.7 * 2 / 3, 1)):
        assert at(read, "coefficient", q_proj(layer)) == pytest.approx((number,))
        assert at(read, "coefficient", up_proj(layer)) == pytest.approx((1 - number,))
    assert at(read, "coefficient", "model.layers.0.input_layernorm.weight") == (0.5,)
    assert read.recipe.dtype == "bfloat16"


def test_passthrough_scales_a_source(write: Write) -> None:
    scale = [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]
    sources = [{"model": V1, "layer_range": [0, 4], "parameters": {"scale": scale}}]
    read = read_mergekit(write({"merge_method": "passthrough", "slices": [{"sources": sources}]}))
    assert at(read, "scale", "model.layers.3.self_attn.o_proj.weight") == (0.0,)
    assert at(read, "scale", q_proj(3)) == (1.0,)
    assert at(read, "coefficient", q_proj(3)) == (1.0,)


def test_who_is_the_base(write: Write) -> None:
    slerp = {
        "merge_method": "slerp",
        "base_model": V1,
        "models": [{"model": V1}, {"model": V2}],
        "parameters": {"t": 0.4},
    }
    read = read_mergekit(write(slerp))
    assert Path(read.recipe.base).name == "v1"
    assert list(read.recipe.experts) == ["v2"]
    assert at(read, "coefficient", q_proj(0)) == (0.4,)
    for method, base, relative in (("nuslerp", None, False), ("nuslerp", BASE, True), ("multislerp", BASE, True)):
        read = read_mergekit(write(ties(merge_method=method, base_model=base)))
        assert read.recipe.options["relative"] is relative
        assert Path(read.recipe.base).name == ("base" if base else "v1")
        assert list(read.recipe.experts) == ["v1", "v2"]


def test_an_adapter_is_written_after_its_model(write: Write, folder: Path) -> None:
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    models = [{"model": f"{BASE}+adapter", "parameters": {"weight": 0.5}}]
    for sections in (ties(merge_method="task_arithmetic", models=models), {"merge_method": "linear", "models": models}):
        read = read_mergekit(write(sections))
        assert Path(read.recipe.base).name == "base"
        assert list(read.recipe.experts) == ["adapter"]
        again = mergekit_data(read.recipe, (read.base, *read.experts))
        assert again["models"][0]["model"] == f"{folder / BASE}+{adapter}"
        assert read_mergekit(write(again)).recipe == read.recipe


def test_what_has_no_effect_is_said(write: Write) -> None:
    models = [
        {"model": BASE, "parameters": {"weight": 1.0}},
        *weights([{"filter": "self_atn", "value": 0.1}, {"value": 1.0}]),
    ]
    sections = ties(models=models, parameters={"int8_mask": True}, tokenizer={"source": "base"}, chat_template=None)
    notes = " | ".join(read_mergekit(write(sections)).notes)
    assert "models[0].parameters: the base's own parameters have no effect in ties" in notes
    assert "parameters.int8_mask: saves memory in mergekit" in notes
    assert "models[1].parameters.weight[0]: the filter 'self_atn' is not used" in notes


def test_paths_are_relative_to_the_file_or_to_the_present_folder(
    write: Write, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(write(ties()), tmp_path / "elsewhere.yaml")
    with pytest.raises(InputError, match=r"base: no folder inputs/base|base: expected a checkpoint folder"):
        read_mergekit(Path(path))
    monkeypatch.chdir(folder)
    assert read_mergekit(Path(os.path.relpath(path))).recipe == read_mergekit(write(ties())).recipe


def test_a_recipe_of_ours_is_told_from_one_of_mergekits(write: Write) -> None:
    ours = read_any_recipe(write({"base": BASE, "experts": {"v1": V1, "v2": V2}, "coefficient": 0.3}, "ours.yaml"))
    theirs = read_any_recipe(write(ties(merge_method="task_arithmetic", models=weights(0.3, 0.3))))
    assert ours.recipe.experts == theirs.recipe.experts
    assert ours.recipe.groups != theirs.recipe.groups


def sliced(first: list[int], second: list[int], **changes: Any) -> dict[str, Any]:
    sources = [{"model": V1, "layer_range": first}, {"model": V2, "layer_range": second}]
    return {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1.0}} | changes


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (ties(merge_method="tise"), "merge_method: unknown merge method 'tise'; did you mean 'ties'?"),
    (ties(merge_method=None, slices=[]), "merge_method: missing"),
    (ties(base_model=None), "base_model: missing; ties merges what the models changed of it"),
    (ties(models=None), "expected models or slices, found neither"),
    (ties(modules={"text": {}}), "modules: cannot be read: several modules in one file; merge each"),
    (ties(dtyp="float32"), "dtyp: unknown key; did you mean 'dtype'?"),
    (ties(dtype="int8"), "dtype: expected 'float32', 'bfloat16' or 'float16', found 'int8'"),
    (
        ties(tokenizer_source="union"),
        "tokenizer_source: cannot be read: the merged model has the tokenizer of its base",
    ),
    (ties(tokenizer={"source": "union"}), "tokenizer.source: cannot be read"),
    (ties(tokenizer={"source": "base", "tokens": {"<x>": {}}}), "tokenizer.tokens: cannot be read"),
    (ties(chat_template="chatml"), "chat_template: cannot be read"),
    (
        ties(parameters={"densty": 0.5}),
        "parameters.densty: cannot be read: ties has no such parameter; did you mean 'density'",
    ),
    (ties(parameters={"density": 1.5}), r"parameters.density: expected a number in \[0, 1\], found 1.5"),
    (ties(parameters={"rescale": 2}), "parameters.rescale: expected true or false, found 2"),
    (
        ties(parameters={"normalize": [{"filter": "mlp", "value": True}, {"value": False}]}),
        "parameters.normalize: cannot be read: true for .*mlp.* and false for .*; give one for all",
    ),
    (ties(models=[{"model": V1}]), "models[0].parameters.weight: missing for model.embed_tokens.weight; ties needs it"),
    (
        ties(models=weights(0.3, "x")),
        "models[1].parameters.weight: expected a number, a list of numbers over the layers",
    ),
    (ties(models=weights(True)), "models[0].parameters.weight: expected a number, found True"),
    (
        ties(models=weights([{"filtr": "mlp", "value": 1.0}])),
        "models[0].parameters.weight[0]: expected filter and value",
    ),
    (ties(models=[{"model": BASE}]), "models: expected one beside the base, found none"),
    (ties(models=[{"model": V1}] * 2), "models[1].model: inputs/v1 is the same model as inputs/v1; one"),
    (ties(models=[{"model": V1}, {"model": f"./{V1}"}]), "models[1].model: ./inputs/v1 is the same model as inputs/v1"),
    (
        ties(merge_method="karcher", base_model=None, parameters={"weight": 1.0, "tol": 1e-3}),
        "karcher has no such parameter",
    ),
    (ties(merge_method="multislerp", parameters={"normalize_weights": False}), "it is always True here; leave it out"),
    (
        ties(models=[{"model": V1, "parameters": {"weight": 1.0, "normalize": False}}]),
        "models[0].parameters.normalize: is read for the slice or the file, not for a model",
    ),
    (ties(merge_method="della"), r"models[0].parameters.density: expected a number in [0.15, 0.85], found 1"),
    (
        ties(
            merge_method="della",
            parameters={"density": 0.5, "epsilon": [{"filter": "mlp", "value": 0.2}, {"value": 0.1}]},
        ),
        "epsilon: cannot be read: 0.1 and 0.2; give one for all models",
    ),
    (ties(merge_method="linear"), "base_model: linear has no base but merges it like any model"),
    (
        ties(merge_method="slerp", models=[{"model": V1}, {"model": V2}]),
        "slerp merges 1 model beside the base, found 2",
    ),
    (
        ties(merge_method="passthrough", base_model=None, models=[{"model": V1}, {"model": V2}]),
        "expected one source each",
    ),
    (ties(models=[{"model": f"{V2}+{V1}", "parameters": {"weight": 1.0}}]), "an adapter of another model than"),
    (sliced([0, 2], [0, 3]), "slices[0]: expected sources of the same number of layers, found 2 and 3"),
    (sliced([2, 0], [0, 2]), "slices[0].sources[0].layer_range: expected two growing numbers of layers"),
    (sliced([3, 5], [0, 2]), "layer 1: expert v1 has layers 0 to 3, not 4"),
    (
        sliced([0, 2], [2, 4], merge_method="task_arithmetic", base_model=BASE),
        "slices[0].sources: expected the base among them: which of its layers?",
    ),
    (
        {
            "merge_method": "model_stock",
            "base_model": BASE,
            "slices": [
                {"sources": [{"model": V1, "layer_range": [0, 2]}, {"model": V2, "layer_range": [0, 2]}]},
                {"sources": [{"model": V1, "layer_range": [2, 4]}, {"model": V3, "layer_range": [2, 4]}]},
            ],
        },
        "slices: model_stock merges the same models everywhere, and v2 is no source of model.layers.2",
    ),
]


@pytest.mark.parametrize(("sections", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(write: Write, sections: dict[str, Any], message: str) -> None:
    path = write(sections, "mistake.yaml")
    pattern = message if "\\" in message or ".*" in message else re.escape(message)
    with pytest.raises(InputError, match=pattern) as caught:
        read_any_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
