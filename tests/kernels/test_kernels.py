"""The kernels by themselves: padding, chunks, precision, hashes, and products."""

import pytest
import torch
from torch import Tensor

from evomerge.kernels.launch import CHUNK_BLOCKS
from evomerge.kernels.layout import BLOCK, Layout
from evomerge.kernels.lincomb import lincomb, task_vector_products
from evomerge.kernels.masked import block_keys
from evomerge.kernels.sources import Dense, LowRank, Sources
from evomerge.kernels.tiles import hash32
from evomerge.records import TensorInfo


def sources(base_P: Tensor, *experts: Tensor | Dense | LowRank, block_tensors: bool = False) -> Sources:
    """A model of one tensor, or of one tensor a block."""
    shapes = [(BLOCK,)] * (len(base_P) // BLOCK) if block_tensors else [(len(base_P),)]
    layout = Layout.of(tuple(TensorInfo(f"t{s}", shape) for s, shape in enumerate(shapes)))
    padded_P = torch.zeros(layout.num_padded, dtype=base_P.dtype)
    held = []
    for expert in (base_P, *experts):
        if isinstance(expert, Tensor):
            buffer_P = padded_P.clone()
            buffer_P[: len(expert)] = expert
            held.append(Dense(buffer_P))
        else:
            held.append(expert)
    assert isinstance(held[0], Dense)
    return Sources(layout, held[0].buffer_P, tuple(held[1:]))


@pytest.mark.parametrize("num_blocks", [1, CHUNK_BLOCKS - 1, CHUNK_BLOCKS, CHUNK_BLOCKS + 1, 2 * CHUNK_BLOCKS + 3])
def test_every_block_is_written_with_its_own_weight(num_blocks: int) -> None:
    held = sources(torch.ones(num_blocks * BLOCK), torch.full((num_blocks * BLOCK,), 3.0), block_tensors=True)
    weights_KS = torch.stack([torch.ones(num_blocks), torch.arange(num_blocks) / 8]).double()
    out_P = torch.full_like(held.base_P, float("nan"))
    lincomb(out_P, held, weights_KS)
    expected = (1 + 2 * torch.arange(num_blocks) / 8)[:, None].expand(num_blocks, BLOCK)
    assert torch.equal(out_P.view(num_blocks, BLOCK), expected)


def test_bfloat16_sums_are_kept_in_float32() -> None:
    """256 experts that move a weight of 1 by 2^-9 each: a bfloat16 sum would stay at 1, since 1 + 2^-9 rounds to 1."""
    base_P = torch.ones(BLOCK, dtype=torch.bfloat16)
    held = sources(base_P, *[torch.full((BLOCK,), 1 + 2.0**-7, dtype=torch.bfloat16)] * 256)
    weights_KS = torch.cat([torch.ones(1, 1), torch.full((256, 1), 0.25)]).double()
    out_P = torch.empty_like(base_P)
    lincomb(out_P, held, weights_KS)
    assert torch.equal(out_P, torch.full_like(base_P, 1.5))


def test_every_form_of_an_expert_gives_the_same_merge() -> None:
    """A checkpoint, its task vector, that in int8, and an adapter whose product it is."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(40, 2, generator=generator), torch.randn(2, 60, generator=generator)
    base_E, vector_E = torch.randn(2400, generator=generator), (b @ a).flatten()
    layout = Layout.of((TensorInfo("t", (40, 60)),))

    def padded(flat_E: Tensor) -> Tensor:
        return torch.cat([flat_E, torch.zeros(layout.num_padded - len(flat_E))])

    scales_B = padded(vector_E).view(-1, BLOCK).abs().amax(1) / 127
    codes_P = (padded(vector_E).view(-1, BLOCK) / scales_B[:, None]).round().flatten().to(torch.int8)
    forms = {
        "checkpoint": Dense(padded(base_E + vector_E)),
        "task vector": Dense(padded(vector_E), is_task_vector=True),
        "int8": Dense(codes_P, is_task_vector=True, scales_B=scales_B),
        "adapter": LowRank({0: (b, a)}),
    }
    weights_KS = torch.tensor([[1.0], [0.3]], dtype=torch.float64)
    for name, form in forms.items():
        held = Sources(layout, padded(base_E), (form,))
        out_P = torch.full((layout.num_padded,), float("nan"))
        lincomb(out_P, held, weights_KS)
        tolerance = float(scales_B.max()) / 2 if name == "int8" else 0.0  # half a step
        torch.testing.assert_close(out_P[:2400], base_E + 0.3 * vector_E, rtol=1e-5, atol=tolerance + 1e-5, msg=name)
        torch.testing.assert_close(held.task_vector(0, 0).flatten(), vector_E, rtol=1e-5, atol=tolerance + 1e-5)
        gradient_E = torch.linspace(-1, 1, 2400)
        expected = float(gradient_E.double() @ vector_E.double())
        products = task_vector_products(gradient_E, held, 0)
        assert float(products[1]) == pytest.approx(expected, rel=1e-4, abs=2400 * tolerance)


@pytest.mark.parametrize("is_task_vector", [False, True])
def test_parts_that_share_a_buffer_are_weighed_block_by_block(is_task_vector: bool) -> None:
    """Two parts of one expert and another expert between them, against sums by hand; the last block is cut short."""
    generator = torch.Generator().manual_seed(0)
    base_E, vector_E, other_E = torch.randn(3, 2 * BLOCK + 100, generator=generator)
    buffer_P = torch.zeros(3 * BLOCK)
    buffer_P[: len(base_E)] = vector_E if is_task_vector else base_E + vector_E
    factors = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 3.0]])
    one, two = (Dense(buffer_P, is_task_vector, scales_B) for scales_B in factors)
    held = sources(base_E, one, other_E, two)
    parts = [vector_E * scales_B.repeat_interleave(BLOCK)[: len(base_E)] for scales_B in factors]
    expected = 0.9 * base_E + 0.3 * parts[0] + 0.5 * (other_E - base_E) - 0.2 * parts[1]
    out_P = torch.full_like(held.base_P, float("nan"))
    lincomb(out_P, held, torch.tensor([[0.9], [0.3], [0.5], [-0.2]], dtype=torch.float64))
    torch.testing.assert_close(out_P[: len(base_E)], expected, rtol=1e-5, atol=1e-5)
    assert not out_P[len(base_E) :].any()

    gradient_E = torch.randn(len(base_E), generator=generator)
    products = task_vector_products(gradient_E, held, 0)
    for k, part in ((0, parts[0]), (2, parts[1])):
        torch.testing.assert_close(held.task_vector(k, 0), part, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(held.expert(k, 0), base_E + part, rtol=1e-5, atol=1e-5)
        assert float(products[1 + k]) == pytest.approx(float(gradient_E.double() @ part.double()), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("exponent", [1, 2])
def test_absolute_sums_are_of_task_vectors_tensor_by_tensor(exponent: int) -> None:
    """Of a checkpoint and of an adapter that leaves the second tensor alone; the first takes several chunks."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout.of((TensorInfo("large", (700, 300)), TensorInfo("small", (7,))))
    base_P, expert_P = torch.zeros(2, layout.num_padded)
    for segment in layout.segments:
        base_P[segment], expert_P[segment] = torch.randn(2, segment.stop - segment.start, generator=generator)
    b, a = torch.randn(700, 2, generator=generator), torch.randn(2, 300, generator=generator)
    held = Sources(layout, base_P, (Dense(expert_P), LowRank({0: (b, a)})))
    assert len(list(held.chunks(0))) > 1
    sums_KS = held.absolute_sums(exponent)
    vectors = [(expert_P - base_P)[segment].double() for segment in layout.segments]
    expected = [
        [vector.abs().pow(exponent).sum() for vector in vectors],
        [(b @ a).double().abs().pow(exponent).sum(), 0],
    ]
    torch.testing.assert_close(sums_KS, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_products_are_inner_products_with_base_and_task_vectors() -> None:
    base_E = torch.tensor([3.0, 0.5, 2.0])
    held = sources(base_E, torch.tensor([4.0, 0.5, 2.0]), torch.tensor([3.0, 1.0, 0.0]))
    products = task_vector_products(torch.tensor([1.0, 2.0, -1.0]), held, 0)
    assert products.tolist() == [2.0, 1.0, 3.0]
    assert products.dtype == torch.float64


def test_products_of_half_precision_tensors_do_not_overflow() -> None:
    """10,000 terms of 100 * 100: a float16 sum would be infinite."""
    hundred_E = torch.full((10_000,), 100.0, dtype=torch.float16)
    assert task_vector_products(hundred_E, sources(hundred_E, 2 * hundred_E), 0).tolist() == [1e8, 1e8]


def test_the_hash_mixes_and_hits_every_result_once() -> None:
    """2^16 neighbours: no two alike, every bit set half of the time, also given any other bit of the input."""
    hashed = hash32(torch.arange(2**16, dtype=torch.int32))
    assert len(hashed.unique()) == 2**16
    bits = torch.stack([(hashed >> bit) & 1 for bit in range(32)]).double()
    assert ((bits.mean(1) - 0.5).abs() < 5 * 0.5 / 256).all()  # five standard deviations of 2^16 coins
    flipped = hash32(torch.arange(2**16, dtype=torch.int32) ^ 1)
    changed = torch.stack([((hashed ^ flipped) >> bit) & 1 for bit in range(32)]).double().mean(1)
    assert ((changed - 0.5).abs() < 0.02).all()


def test_a_tensors_keys_depend_on_its_name_and_not_on_where_it_lies() -> None:
    sizes = {"first": 3000, "second": 1024, "third": 2049}

    def keys(order: list[str]) -> dict[str, Tensor]:
        layout = Layout.of(tuple(TensorInfo(name, (sizes[name],)) for name in order))
        held = Sources(layout, torch.zeros(layout.num_padded), (Dense(torch.zeros(layout.num_padded)),) * 2)
        keys_KB = block_keys(held, seed=3)
        return {name: keys_KB[:, layout.block_segment == s] for s, name in enumerate(order)}

    one, other = keys(["first", "second", "third"]), keys(["third", "first", "second"])
    assert all(torch.equal(one[name], other[name]) for name in sizes)
    assert len(torch.cat([one[name].flatten() for name in sizes]).unique()) == 3 * (3 + 1 + 3)
