"""Every registered operator on a CUDA device as on the CPU, wherever base and experts are held."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_every_operator import opened, recipe

from evomerge.assemble import OPERATORS
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.residence import Place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

Family = Callable[[str, str], list[Path]]
SAME_BITS = {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"}
"""Whose preparation is exact on both: what is left is the kernel, which rounds alike."""


def built(family: Family, name: str, place: Place, dtype: str = "bfloat16") -> Materializer:
    """The tiny tied model after a merge, a rebuild of its last tensor, and a whole merge again."""
    operator, base, experts = opened(family, name, "tied", dtype)
    held = Materializer(base, list(experts.values()), dtype=dtype, place=place)
    for factor in (1.0, 0.9, 1.0):
        held.build(operator, replace(recipe(operator, base, experts, held, factor), int8=held.residence == "int8"))
    return held


@pytest.mark.parametrize("residence", ["resident", "int8"])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_merges_agree(family: Family, name: str, residence: str) -> None:
    here, there = (built(family, name, Place(device, residence)) for device in ("cpu", "cuda"))
    assert there.residence == residence
    assert there.kernels == "Triton kernels"  # and not what would be taken after they failed
    moved, difference = (here.out_P - here.base_P).float(), (there.out_P.cpu() - here.out_P).float()
    # Decompositions and sums of squares are rounded otherwise on a GPU; a trim may then fall otherwise for an entry.
    assert difference.norm() <= 0.02 * moved.norm()
    if name in SAME_BITS:
        assert not difference.any()


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_a_merge_on_the_host_has_the_same_bits(family: Family, name: str) -> None:
    host, resident = (built(family, name, Place("cuda", residence)) for residence in ("host", "resident"))
    assert host.sources.device.type == "cpu"
    assert host.out_P.is_cuda
    assert host.weights_hash() == resident.weights_hash()
    host.resident.check_views()


def test_auto_keeps_what_is_small_on_the_device(family: Family) -> None:
    held = built(family, "task_arithmetic", Place("cuda"))
    assert held.residence == "resident"
    assert held.sources.device.type == "cuda"
