"""Where base and experts are held, by memory; and what is built there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_every_operator import opened, recipe

from evomerge.campaign.assemble import OPERATORS
from evomerge.campaign.recipe_file import read_recipe, write_recipe
from evomerge.errors import InputError
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Dense, LowRank
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.residence import Place, choose_residence, device_bytes, to_int8
from evomerge.operators.linear import TaskArithmetic
from evomerge.publish.export import merge_recipe
from evomerge.records import Recipe

Family = Callable[[str, str], list[Path]]

GB = 10**9
LLAMA_7B = device_bytes(14 * GB, num_experts=3, element_bytes=2)


def test_bytes_of_a_model_of_7_billion_and_three_experts() -> None:
    assert LLAMA_7B["resident"] == 70 * GB
    assert LLAMA_7B["int8"] == pytest.approx((28 + 21 * (1 + 4 / 1024)) * GB)
    assert LLAMA_7B["host"] == 14 * GB


@pytest.mark.parametrize(
    ("free", "expected"), [(141, "resident"), (93.4, "resident"), (93, "host"), (80, "host"), (24, "host")]
)
def test_auto_takes_resident_where_a_quarter_stays_free_and_else_the_host(free: float, expected: str) -> None:
    assert choose_residence("auto", LLAMA_7B, int(free * GB)) == expected


def test_auto_never_takes_int8() -> None:
    """It would be another merge: only whoever writes the campaign can want that."""
    assert all(choose_residence("auto", LLAMA_7B, free * GB) != "int8" for free in range(19, 200))


@pytest.mark.parametrize(("asked", "free"), [("resident", 71), ("int8", 50), ("host", 15)])
def test_what_is_asked_for_is_taken_if_it_fits_at_all(asked: str, free: int) -> None:
    assert choose_residence(asked, LLAMA_7B, free * GB) == asked


@pytest.mark.parametrize(
    ("asked", "free", "message"),
    [
        ("resident", 60, r"residence: resident needs 70\.0 GB .* at most 60\.0 .*; residence: int8 or host fits"),
        ("int8", 40, r"residence: int8 needs 49\.1 GB .*; residence: host fits"),
        ("host", 10, r"residence: host needs 14\.0 GB .*device: cpu"),
        ("auto", 16, r"residence: host needs 14\.0 GB .* at most 12\.0 of the 16\.0 GB .*device: cpu"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(asked: str, free: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_residence(asked, LLAMA_7B, free * GB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_task_vector", [False, True])
def test_int8_is_off_by_half_a_step_of_its_block(dtype: torch.dtype, is_task_vector: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    base_P = torch.randn(5 * BLOCK, generator=generator).to(dtype)
    size_B = torch.tensor([1.0, 1e-3, 0.0, 1e-42, 1e3])  # an unmoved block, and one of subnormal numbers
    vector_P = torch.randn(5 * BLOCK, generator=generator) * size_B.repeat_interleave(BLOCK)
    held_P = vector_P.to(dtype) if is_task_vector else (base_P.float() + vector_P).to(dtype)
    exact_BE = (held_P.double() - (0 if is_task_vector else base_P.double())).view(5, BLOCK)
    quantized = to_int8(Dense(held_P, is_task_vector), base_P)
    assert quantized.is_task_vector
    assert quantized.scales_B is not None
    restored_BE = quantized.buffer_P.view(5, BLOCK).double() * quantized.scales_B.double()[:, None]
    error_B = (restored_BE - exact_BE).abs().amax(1)
    largest_B = exact_BE.abs().amax(1)
    # Half a step of 1/127, a rounding of the factor, and for subnormal factors a step of theirs 127 times.
    assert (error_B <= largest_B / 254 * (1 + 1e-5) + 128 * 1.5e-45).all()
    assert torch.equal(restored_BE[2], torch.zeros(BLOCK).double()) or largest_B[2] > 0
    relative = (restored_BE - exact_BE)[0].norm() / exact_BE[0].norm()
    assert 0.005 < relative < 0.009


@pytest.fixture
def merge_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that is too small."""
    choose = Place.choose
    monkeypatch.setattr(Place, "choose", lambda *asked: replace(choose(*asked), residence="host"))


def held_by(
    family: Family, name: str, place: Place, dtype: str = "float32"
) -> tuple[Materializer, Callable[[float], Recipe]]:
    """A materializer of the tiny tied model, and recipes with the last tensor's first parameter times a factor."""
    operator, base, experts = opened(family, name, "tied", dtype)
    held = Materializer(base, list(experts.values()), dtype=dtype, place=place)
    is_int8 = held.residence == "int8"
    return held, lambda factor: replace(recipe(operator, base, experts, held, factor), int8=is_int8)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_a_merge_on_the_host_ends_up_in_the_model(family: Family, name: str, request: pytest.FixtureRequest) -> None:
    operator = OPERATORS[name]()
    there, recipe_of = held_by(family, name, Place())
    request.getfixturevalue("merge_on_the_host")
    held, _ = held_by(family, name, Place())
    assert held.residence == "host"
    for factor in (1.0, 0.9, 1.0):
        there.build(operator, recipe_of(factor))
        held.build(operator, recipe_of(factor))
        assert held.weights_hash() == there.weights_hash()
    held.resident.check_views()


def test_gradients_reach_task_vectors_on_the_host(family: Family, request: pytest.FixtureRequest) -> None:
    operator = TaskArithmetic()
    gradients = []
    for fixture in ((), ("merge_on_the_host",)):
        for name in fixture:
            request.getfixturevalue(name)
        held, recipe_of = held_by(family, "task_arithmetic", Place())
        parameters = list(held.resident.parameters.values())
        [(_, gradient)] = held.gradients(operator, recipe_of(1.0), [lambda p=parameters: sum((t**2).sum() for t in p)])
        gradients.append(gradient["coefficient"])
    np.testing.assert_array_equal(gradients[0], gradients[1])


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_merges_task_vectors_in_8_bits(family: Family, name: str) -> None:
    """Off by 0.8 % where the rule is linear, by up to 17 % where trims and elections fall otherwise for some entries.

    Adapters that stay factors are exact.
    """
    moved = []
    for residence in ("resident", "int8"):
        held, recipe_of = held_by(family, name, Place(residence=residence))
        held.build(OPERATORS[name](), recipe_of(1.0))
        moved.append(held.out_P - held.base_P)
        if residence == "int8":
            dense = [expert for expert in held.sources.experts if isinstance(expert, Dense)]
            assert all(expert.buffer_P.dtype == torch.int8 for expert in dense)
            assert dense or all(isinstance(expert, LowRank) for expert in held.sources.experts)
    assert float((moved[1] - moved[0]).norm()) < 0.25 * float(moved[0].norm())
    assert torch.equal(*moved) == (name == "lora")


def test_an_8_bit_recipe_is_another_merge_and_is_built_again_from_its_file(family: Family, tmp_path: Path) -> None:
    held, recipe_of = held_by(family, "ties", Place(residence="int8"), "bfloat16")
    operator, in_8_bits = OPERATORS["ties"](), recipe_of(1.0)
    held.build(operator, in_8_bits)
    write_recipe(in_8_bits, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml").recipe.int8
    built = merge_recipe(tmp_path / "recipe.yaml", tmp_path / "merged", "cpu", lambda _: None).weights
    assert built == held.weights_hash()
    exact = replace(in_8_bits, int8=False)
    assert exact.fingerprint(held.hashes) != in_8_bits.fingerprint(held.hashes)
    with pytest.raises(AssertionError):
        held.build(operator, exact)


def test_fingerprints_of_recipes_without_it_stay_what_they_were() -> None:
    simple = Recipe(
        operator="task_arithmetic",
        options={},
        base="b",
        experts={"x": "e"},
        dtype="float32",
        groups={"model": ("t",)},
        values={"coefficient": ((0.5,),)},
    )
    assert simple.fingerprint({"b": "00", "e": "11"}) == "c32fc8fbf60be1af"
