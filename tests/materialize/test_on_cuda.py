"""Every registered operator on a CUDA device as on the CPU, wherever base and experts are held."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from test_every_operator import opened, recipe

from evomerge.campaign.assemble import OPERATORS
from evomerge.evaluators.layouts import TokenSequence
from evomerge.evaluators.sequences import logprobs
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
    assert host.resident.buffers[0].is_cuda
    assert host.out_P.is_pinned()
    assert host.weights_hash() == resident.weights_hash()
    host.resident.check_views()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_model_on_two_devices_is_that_on_one(family: Family, kind: str) -> None:
    operator, base, experts = opened(family, "task_arithmetic", kind, "float32")
    found = []
    for device in ("cuda:0", "cuda:0,cuda:1"):
        held = Materializer(base, list(experts.values()), dtype="float32", place=Place(device, "host"))
        at = recipe(operator, base, experts, held)
        model, tokens = held.module, tiny.TOKENS.to("cuda:0")
        [(loss, gradient)] = held.gradients(operator, at, [lambda m=model, t=tokens: m(input_ids=t, labels=t).loss])
        written = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        sequences = [TokenSequence((*range(3, 23), a, b), 2) for a, b in ((1, 2), (7, 8), (9, 4))]
        found.append((held.weights_hash(), loss, gradient["coefficient"], written, logprobs(model, sequences, 4)[0]))
    assert [room.device.index for room in held.resident.devices] == [0, 1]
    (hash_1, loss_1, gradient_1, written_1, logp_1), (hash_2, loss_2, gradient_2, written_2, logp_2) = found
    assert hash_1 == hash_2
    assert loss_1 == pytest.approx(loss_2)
    np.testing.assert_allclose(gradient_2, gradient_1, rtol=1e-4, atol=1e-6)
    assert torch.equal(written_1, written_2)
    torch.testing.assert_close(logp_2, logp_1)


def test_auto_keeps_what_is_small_on_the_device(family: Family) -> None:
    held = built(family, "task_arithmetic", Place("cuda"))
    assert held.residence == "resident"
    assert held.sources.device.type == "cuda"
