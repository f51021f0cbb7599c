"""Tensors as vectors: which rows are read, their inner products, and merges by row and column."""

from collections.abc import Mapping

import pytest
import torch
from operator_contract import Problem, lay_out, lines_of
from torch import Tensor

from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Dense, LowRank, Sources
from evomerge.operators.vectors import Vectors, inner_products, lengths_and_cosines, lincomb_vectors, of_experts
from evomerge.records import TensorInfo

SHAPES = {"long": (90, 1500), "convolution": (4, 3, 2, 2), "vector": (11,), "scalar": ()}  # long: several chunks


def random(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def in_every_form() -> Sources:
    """A checkpoint, a task vector, one in int8, and an adapter with a tensor held whole."""
    checkpoint, vector, int8 = lay_out(Problem(random(0), [random(1), random(2), random(3)], {})).experts
    sources = lay_out(Problem(random(0), [], {}))
    assert isinstance(checkpoint, Dense)
    assert isinstance(vector, Dense)
    assert isinstance(int8, Dense)
    num_blocks = len(int8.buffer_P) // BLOCK
    scales_B = torch.rand(num_blocks, generator=torch.Generator().manual_seed(4)) + 0.1
    quantized = Dense((int8.buffer_P * 20).to(torch.int8), is_task_vector=True, scales_B=scales_B)
    factors: Mapping[int, tuple[Tensor, Tensor]] = {
        0: (random(5)["long"][:, :2], random(6)["long"][:2]),
        1: (random(5)["convolution"].reshape(-1, 1), torch.ones(1, 1)),
        2: (random(5)["vector"].reshape(-1, 1), torch.ones(1, 1)),
    }
    experts = (checkpoint, Dense(vector.buffer_P, is_task_vector=True), quantized, LowRank(factors))
    return Sources(sources.layout, sources.base_P, experts)


def test_rows_are_rows_of_the_whole_whatever_form_an_expert_has() -> None:
    sources = in_every_form()
    for s, tensor in enumerate(sources.layout.tensors):
        num_rows, num_columns = tensor.matrix
        rows = slice(min(1, num_rows - 1), max(1, num_rows - 1))
        assert torch.equal(sources.base(s, rows), sources.base(s).view(num_rows, num_columns)[rows])
        for k in range(sources.num_experts):
            for read in (sources.task_vector, sources.expert):
                torch.testing.assert_close(read(k, s, rows), read(k, s).view(num_rows, num_columns)[rows])


@pytest.mark.parametrize(
    ("shape", "matrix"), [((), (1, 1)), ((5,), (1, 5)), ((3, 4), (3, 4)), ((1, 4, 2), (1, 8)), ((0, 4), (0, 0))]
)
def test_a_tensor_as_a_matrix(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert TensorInfo("t", shape).matrix == matrix


@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
def test_inner_products_are_those_of_the_vectors(vectors: Vectors) -> None:
    sources = in_every_form()
    for s, tensor in enumerate(sources.layout.tensors):
        held = [sources.base(s), *(sources.task_vector(k, s) for k in range(sources.num_experts))]
        matrices = [one.double().view(tensor.matrix) for one in held]
        groups = list(zip(*(lines_of(matrix, vectors) for matrix in matrices), strict=True))
        expected = torch.stack([torch.stack(group) @ torch.stack(group).T for group in groups])
        # Exact but for the order of float64 sums; an adapter's product is itself rounded row by row.
        torch.testing.assert_close(inner_products(sources, s, vectors), expected, rtol=1e-6, atol=1e-5)


def test_what_tells_experts_apart_survives_a_large_base() -> None:
    """Two task vectors at right angles, 10^8 times shorter than the base."""
    base = {"t": torch.zeros(4).fill_(2.0**20)}
    ups = [{"t": base["t"] + torch.tensor(tau)} for tau in ([0.125, 0.0, 0.0, 0.0], [0.0, 0.125, 0.0, 0.0])]
    products = inner_products(lay_out(Problem(base, ups, {})), 0, "tensor")
    _, cosines = lengths_and_cosines(products[:, 1:, 1:])
    assert cosines.tolist() == [[[1.0, 0.0], [0.0, 1.0]]]


def test_whole_experts_products_follow_from_task_vectors() -> None:
    base, *experts = random(0), random(1), random(2)
    sources = lay_out(Problem(base, experts, {}))
    held = torch.stack([one["long"].double().flatten() for one in (base, *experts)])
    torch.testing.assert_close(of_experts(inner_products(sources, 0, "tensor"))[0], held @ held.T, rtol=1e-6, atol=1e-2)


def test_a_vector_of_no_length_is_perpendicular_to_all() -> None:
    lengths, cosines = lengths_and_cosines(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]], dtype=torch.float64))
    assert lengths.tolist() == [[2.0, 0.0]]
    assert cosines.tolist() == [[[1.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("s", range(len(SHAPES)))
def test_each_vector_takes_its_own_weights(vectors: Vectors, s: int) -> None:
    sources = in_every_form()
    tensor = sources.layout.tensors[s]
    size = {"tensor": 1, "rows": tensor.matrix[0], "columns": tensor.matrix[1]}[vectors]
    weights_KV = torch.rand(5, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    out_P = torch.full_like(sources.base_P, float("nan"))
    lincomb_vectors(out_P, sources, s, weights_KV, vectors)
    held = [sources.base(s), *(sources.task_vector(k, s) for k in range(sources.num_experts))]
    expected = torch.zeros(tensor.matrix, dtype=torch.float64)
    for weights_V, one in zip(weights_KV, held, strict=True):
        expected += one.view(tensor.matrix).double() * (weights_V[:, None] if vectors == "rows" else weights_V)
    [run] = sources.layout.runs([s])
    written = out_P[run.start * BLOCK : run.stop * BLOCK]
    torch.testing.assert_close(written[: expected.numel()].double(), expected.flatten(), rtol=1e-5, atol=1e-5)
    assert not written[expected.numel() :].any(), "the padding must be zero"
    assert int(out_P.isfinite().sum()) == len(written), "no other tensor is written to"
