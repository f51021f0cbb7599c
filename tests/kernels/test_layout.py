"""The flat layout."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.kernels.layout import BLOCK, Layout
from evomerge.records import TensorInfo

shapes = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=6)


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout.of(tuple(TensorInfo(f"t{s}", shape) for s, shape in enumerate(shapes)))


@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_was_laid_out_is_seen_again(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    layout = layout_of(*shapes)
    named = {f"t{s}": torch.randn(shape).to(dtype) for s, shape in enumerate(shapes)}
    buffer_P = torch.zeros(layout.num_padded, dtype=dtype)
    layout.flatten(named, buffer_P)
    views = layout.views(buffer_P)
    assert list(views) == list(named)
    for name, tensor in named.items():
        assert torch.equal(views[name], tensor)
        assert views[name].shape == tensor.shape
        assert views[name].untyped_storage().data_ptr() == buffer_P.untyped_storage().data_ptr()
    views["t0"].fill_(7.0)
    assert (buffer_P[layout.segments[0]] == 7.0).all()


@given(shapes)
def test_every_tensor_has_blocks_of_its_own(shapes: list[tuple[int, ...]]) -> None:
    layout = layout_of(*shapes)
    owners = layout.block_segment.repeat_interleave(BLOCK)
    assert len(owners) == layout.num_padded
    for s, (segment, shape) in enumerate(zip(layout.segments, shapes, strict=True)):
        assert segment.start % BLOCK == 0
        assert segment.stop - segment.start == torch.Size(shape).numel()
        assert (owners[segment] == s).all()
        assert int((owners == s).sum()) - (segment.stop - segment.start) < BLOCK


def test_each_tensor_takes_its_groups_column() -> None:
    layout = layout_of((2,), (3,), (4,))
    matrix_KG = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = layout.spread({"t0": 1, "t1": 0, "t2": 1}, matrix_KG)
    assert spread.tolist() == [[2.0, 1.0, 2.0], [4.0, 3.0, 4.0]]


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(0, 2),
)
def test_the_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype, flaw: float, which: int) -> None:
    layout = layout_of((5, 7), (2000,), (3,))
    buffer_P = torch.zeros(layout.num_padded, dtype=dtype)
    for view in layout.views(buffer_P).values():
        view.fill_(torch.finfo(dtype).max)
    assert layout.first_non_finite(buffer_P) is None
    for later in range(which, 3):
        buffer_P[layout.segments[later].stop - 1] = flaw
    assert layout.first_non_finite(buffer_P) == f"t{which}"


def test_infinities_of_both_signs_do_not_cancel() -> None:
    layout = layout_of((2,), (2,))
    buffer_P = torch.zeros(layout.num_padded)
    buffer_P[layout.segments[1]] = torch.tensor([float("inf"), float("-inf")])
    assert layout.first_non_finite(buffer_P) == "t1"


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    layout = layout_of((4,), (4,))
    buffer_P = torch.zeros(layout.num_padded, dtype=torch.float16)
    buffer_P[layout.segments[1]] = 60000.0
    assert not buffer_P.sum().isfinite()
    assert layout.first_non_finite(buffer_P) is None
