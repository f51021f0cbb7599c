"""The Triton twins against the tile expressions, by Triton's interpreter on the CPU; real GPUs are in test_gpu.py."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
from test_devices import make_sources, merge_twice
from torch import Tensor

from evomerge.campaign.assemble import OPERATORS
from evomerge.kernels import lincomb, masked
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.tiles import Divide, Elect, Keep, KeptTile, LincombTile, MaskedTile, Vote

pytest.importorskip("triton", reason="needs triton (pip install triton), which is not installed")
if torch.cuda.is_available():
    pytest.skip("on a machine with a GPU test_gpu.py runs the kernels themselves", allow_module_level=True)

from evomerge.kernels import triton_tiles

NUM_BLOCKS = 3
ARE_VECTORS = (False, True, True)


def draw_rows(generator: torch.Generator) -> list[Tensor]:
    """A bfloat16 checkpoint, an int8 task vector and a float32 one."""
    shape = (NUM_BLOCKS * BLOCK,)
    return [
        torch.randn(shape, generator=generator).bfloat16(),
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8),
        torch.randn(shape, generator=generator),
    ]


def draw_masked(
    keep: Keep, rows: Sequence[Tensor], generator: torch.Generator
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Rows and columns of a ``MaskedTile`` whose every number decides something."""
    num_experts = len(rows)
    floats_CB = torch.rand(1 + MaskedTile.FLOATS * num_experts, NUM_BLOCKS, generator=generator)
    floats_CB[3] = floats_CB[3 + 2 * MaskedTile.FLOATS] = 1.0
    floats_CB[3 + MaskedTile.FLOATS] = 0.01
    ints_CB = torch.randint(-(2**31), 2**31, (1 + MaskedTile.INTS * num_experts, NUM_BLOCKS), generator=generator).to(
        torch.int32
    )
    rows = list(rows)
    if keep == "rank":
        floats_CB[MaskedTile.FLOATS :: MaskedTile.FLOATS] = 0.5 / 32767
        probability = torch.full((num_experts, NUM_BLOCKS), 0.2)
        ints_CB[2 :: MaskedTile.INTS] = probability.view(torch.int32)
        rows += [torch.randint(0, 2**15, rows[0].shape, generator=generator).short() for _ in range(num_experts)]
    return rows, (floats_CB, ints_CB)


def expected(tile: triton_tiles.Tile, base_P: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    blocks = [buffer_P.view(-1, BLOCK) for buffer_P in (base_P, *rows)]
    return tile(blocks[0], tuple(blocks[1:]), *columns).view(-1)


@pytest.mark.parametrize("divide", get_args(Divide))
@pytest.mark.parametrize("elect", get_args(Elect))
@pytest.mark.parametrize("keep", get_args(Keep))
def test_masked_consensus_has_the_bits_of_its_tile(keep: Keep, elect: Elect, divide: Divide) -> None:
    generator = torch.Generator().manual_seed(0)
    tile = MaskedTile(ARE_VECTORS, keep, Vote(elect, divide))
    base_P = torch.randn(NUM_BLOCKS * BLOCK, generator=generator).bfloat16()
    rows, columns = draw_masked(keep, draw_rows(generator), generator)
    out_P = torch.full((NUM_BLOCKS * BLOCK,), float("nan"))
    triton_tiles.launch(tile, out_P, [slice(0, NUM_BLOCKS)], base_P, rows, columns)
    assert torch.equal(out_P, expected(tile, base_P, rows, columns))
    moved = (out_P != base_P.float()).double().mean()
    assert 0.1 < moved <= 1  # masks that keep nothing would be equal too


@pytest.mark.parametrize("divide", ["no", "count"])
def test_what_an_expert_adds_by_itself_has_the_bits_of_its_tile(divide: Divide) -> None:
    """One expert at a weight of 1 and the others at 0, which vote all the same."""
    generator = torch.Generator().manual_seed(0)
    tile = KeptTile(MaskedTile(ARE_VECTORS, "magnitude", Vote("unweighted", divide, "none")))
    base_P = torch.randn(NUM_BLOCKS * BLOCK, generator=generator).bfloat16()
    rows, columns = draw_masked("magnitude", draw_rows(generator), generator)
    columns[0][1 :: MaskedTile.FLOATS] = torch.eye(len(rows))[1][:, None]
    out_P = torch.full((NUM_BLOCKS * BLOCK,), float("nan"))
    triton_tiles.launch(tile, out_P, [slice(0, NUM_BLOCKS)], base_P, rows, columns)
    assert torch.equal(out_P, expected(tile, base_P, rows, columns))
    assert 0.1 < (out_P != 0).double().mean() < 0.9


@pytest.mark.parametrize("keep", ["magnitude", "variance"])
def test_scales_and_gains_are_not_read_where_the_tile_does_not(keep: Keep) -> None:
    generator = torch.Generator().manual_seed(0)
    tile = MaskedTile(ARE_VECTORS, keep, Vote("weighted", "weights"), scaled=False, gained=False)
    base_P = torch.randn(NUM_BLOCKS * BLOCK, generator=generator)
    rows, columns = draw_masked(keep, draw_rows(generator), generator)
    for k in range(len(rows)):
        columns[0][2 + k * MaskedTile.FLOATS : 4 + k * MaskedTile.FLOATS] = float("nan")
    out_P = torch.empty_like(base_P)
    triton_tiles.launch(tile, out_P, [slice(0, NUM_BLOCKS)], base_P, rows, columns)
    assert out_P.isfinite().all()
    assert torch.equal(out_P, expected(tile, base_P, rows, columns))


def test_entries_divided_by_their_probability_have_the_bits_of_their_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    tile = MaskedTile(ARE_VECTORS, "rank", Vote(), unbiased=True)
    base_P = torch.randn(NUM_BLOCKS * BLOCK, generator=generator).bfloat16()
    rows, columns = draw_masked("rank", draw_rows(generator), generator)
    out_P = torch.full((NUM_BLOCKS * BLOCK,), float("nan"))
    triton_tiles.launch(tile, out_P, [slice(0, NUM_BLOCKS)], base_P, rows, columns)
    exact = expected(tile, base_P, rows, columns)
    assert torch.equal(out_P, exact)
    assert not torch.equal(exact, expected(replace(tile, unbiased=False), base_P, rows, columns))


@pytest.mark.parametrize("zero", ["positive", "none"])
def test_votes_of_zero_fall_as_in_the_tile(zero: Literal["positive", "none"]) -> None:
    generator = torch.Generator().manual_seed(0)
    tile = MaskedTile((True, True, True), "uniform", Vote("unweighted", "count", zero))
    base_P = torch.zeros(NUM_BLOCKS * BLOCK)
    rows = [torch.randint(-1, 2, base_P.shape, generator=generator).float() for _ in range(2)]
    rows, columns = draw_masked("uniform", [*rows, torch.zeros_like(base_P)], generator)
    for k in range(3):
        columns[0][2 + k * MaskedTile.FLOATS] = columns[0][3 + k * MaskedTile.FLOATS] = 1.0
        columns[1][2 + k * MaskedTile.INTS] = 2**31 - 1  # all are kept
    out_P = torch.full_like(base_P, float("nan"))
    triton_tiles.launch(tile, out_P, [slice(0, NUM_BLOCKS)], base_P, rows, columns)
    assert torch.equal(out_P, expected(tile, base_P, rows, columns))
    opposite = (rows[0] * rows[1]) == -1
    assert 0.1 < opposite.double().mean() < 0.3
    assert (out_P[opposite] > 0).all() if zero == "positive" else (out_P[opposite] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lincomb_has_the_bits_of_its_tile(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base_P = torch.randn(NUM_BLOCKS * BLOCK, generator=generator).to(dtype)
    rows, floats_CB = draw_rows(generator), torch.randn(4, NUM_BLOCKS, generator=generator)
    exact = expected(LincombTile(), base_P, rows, [floats_CB])
    out_P = torch.full_like(exact, float("nan"))
    triton_tiles.launch(LincombTile(), out_P, [slice(0, NUM_BLOCKS)], base_P, rows, [floats_CB])
    assert torch.equal(out_P, exact)
    rounded_P = torch.full_like(base_P, float("nan"))
    triton_tiles.launch(LincombTile(), rounded_P, [slice(0, NUM_BLOCKS)], base_P, rows, [floats_CB])
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest: a whole step instead of half of one.
    torch.testing.assert_close(rounded_P.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_only_the_listed_blocks_are_written() -> None:
    generator = torch.Generator().manual_seed(0)
    base_P, rows = torch.randn(NUM_BLOCKS * BLOCK, generator=generator), draw_rows(generator)
    floats_CB = torch.randn(4, 2 * NUM_BLOCKS, generator=generator)[:, ::2].contiguous()
    exact = expected(LincombTile(), base_P, rows, [floats_CB])
    out_P = torch.full_like(base_P, 7.0)
    triton_tiles.launch(LincombTile(), out_P, [slice(0, 1), slice(2, 3)], base_P, rows, [floats_CB])
    written = torch.tensor([True, False, True]).repeat_interleave(BLOCK)
    assert torch.equal(out_P[written], exact[written])
    assert (out_P[~written] == 7.0).all()
    triton_tiles.launch(LincombTile(), out_P, [], base_P, rows, [floats_CB])
    assert (out_P[~written] == 7.0).all()


def test_columns_may_be_a_part_of_wider_ones() -> None:
    """As where one tensor of a model with adapters is merged by itself."""
    generator = torch.Generator().manual_seed(0)
    base_P, rows = torch.randn(NUM_BLOCKS * BLOCK, generator=generator), draw_rows(generator)
    floats_CB = torch.randn(4, 4 * NUM_BLOCKS, generator=generator)[:, NUM_BLOCKS : 2 * NUM_BLOCKS]
    out_P = torch.empty_like(base_P)
    triton_tiles.launch(LincombTile(), out_P, [slice(0, NUM_BLOCKS)], base_P, rows, [floats_CB])
    assert torch.equal(out_P, expected(LincombTile(), base_P, rows, [floats_CB]))


WITHOUT_TWINS = {"nearswap", "ram", "ramplus_tl", "arcee_fusion", "widen"}
"""Tiles of their own, which torch's compiler brings to a GPU, or tensor by tensor by torch itself."""


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_merges_to_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_products = merge_twice(OPERATORS[name](), make_sources(name, torch.device("cpu")))
    launched = []

    def launch(tile: triton_tiles.Tile, *buffers: Any) -> None:
        launched.append(tile)
        triton_tiles.launch(tile, *buffers)

    for module in (lincomb, masked):
        monkeypatch.setattr(module, "launch", launch)
    built, products = merge_twice(OPERATORS[name](), make_sources(name, torch.device("cpu")))
    assert launched or name in WITHOUT_TWINS
    assert all(map(torch.equal, built, expected))
    if products is not None:
        assert expected_products is not None
        assert torch.equal(products, expected_products)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from evomerge.kernels import triton_tiles

def machine_code(kernel, rows, columns, **constants):
    names = [parameter.name for parameter in kernel.params]
    types = {"out": "*bf16", "blocks": "*i32", "base": "*bf16", "rows": rows} | columns
    types |= {name: "i64" for name in names if name.endswith("stride")} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]

lincomb = machine_code(triton_tiles._lincomb, ("*bf16", "*i8"), {"floats": "*fp32"}, blocks=None)
masked = machine_code(
    triton_tiles._masked, ("*bf16", "*i8"), {"floats": "*fp32", "ints": "*i32"},
    ARE_VECTORS=(False, True), KEEP="variance", UNBIASED=False, SCALED=True, GAINED=True,
    ELECT="weighted", DIVIDE="weights", ZERO="none", KEPT_ALONE=False,
)
for code in (lincomb, masked):
    assert "fma." not in code, "a fused multiply-add rounds otherwise than the tile"
assert "div.rn.f32" in masked
"""


def test_they_compile_for_a_gpu_that_is_not_here() -> None:
    """What the interpreter accepts, the compiler may not; and the rounding that is promised shows in its output."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
