"""How kernels are run: compiled, or eagerly where that is not worth it or not possible; the same either way."""

from collections.abc import Iterator

import pytest
import test_linear
import test_ties
import torch
from operator_contract import merge
from torch import Tensor

from evomerge.kernels import launch
from evomerge.kernels.layout import BLOCK
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.ties import Ties

CPU = torch.device("cpu")


@pytest.fixture
def compile_everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "COMPILE_FROM", 0)
    monkeypatch.setattr(launch, "COMPILE_SUMS_FROM", 0)
    monkeypatch.setattr(launch, "_flaws", {})
    launch._compiled.cache_clear()
    yield
    launch._compiled.cache_clear()


@pytest.mark.usefixtures("compile_everything")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_the_compiled_merge_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = test_linear.TestTaskArithmetic().problem((5000, 1, 2048), torch.bfloat16)
    compiled = merge(TaskArithmetic(), problem)
    assert launch.path(CPU, 10**9) == "compiled kernels", launch._flaws
    monkeypatch.setattr(launch, "COMPILE_SUMS_FROM", 2**62)
    eager = merge(TaskArithmetic(), problem)
    for name, tensor in compiled.items():
        # Products and sums may be fused: a last bit of float32, seen only where bfloat16 rounds the other way.
        assert int((tensor != eager[name]).sum()) <= 1 + tensor.numel() // 1000
        torch.testing.assert_close(tensor, eager[name], rtol=2.0**-7, atol=0)


@pytest.mark.usefixtures("compile_everything")
@pytest.mark.filterwarnings("default")
def test_the_compiled_consensus_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = test_ties.TestTies().problem((5000, 7, 2048), torch.bfloat16)
    compiled = merge(Ties(), problem)
    assert launch.path(CPU, 10**9) == "compiled kernels", launch._flaws
    monkeypatch.setattr(launch, "COMPILE_FROM", 2**62)
    eager = merge(Ties(), problem)
    for name, tensor in compiled.items():
        assert int((tensor != eager[name]).sum()) <= 1 + tensor.numel() // 1000


class Broken:
    """A tile that no compiler takes, but that runs."""

    is_sum = False

    def __call__(self, base: Tensor, rows: tuple[Tensor, ...], column: Tensor) -> Tensor:
        print(end="")  # a side effect: the whole expression cannot become one graph
        return base.float() + float(column[0, 0].item())


@pytest.mark.usefixtures("compile_everything")
@pytest.mark.filterwarnings("default")
def test_where_compiling_fails_the_merge_is_done_eagerly_and_said() -> None:
    out_P, base_P = torch.zeros(4 * BLOCK), torch.arange(4.0 * BLOCK)
    for _ in range(2):
        launch.launch(Broken(), out_P, [slice(0, 4)], base_P, [], [torch.full((1, 4), 2.0)])
        assert torch.equal(out_P, base_P + 2)
    assert launch.path(CPU, 10**9).startswith("eager kernels (compiling failed: ")


def test_small_models_are_not_compiled() -> None:
    assert launch.path(CPU, 10**6) == "eager kernels (small model)"
    assert launch.path(CPU, 10**7) == "compiled kernels (eager ones for plain sums)"


def test_what_a_gpu_computes_with_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object | None] = [object(), None]
    monkeypatch.setattr(launch, "find_spec", lambda name: found[0])
    assert launch.path(torch.device("cuda"), 10**6) == "Triton kernels"
    monkeypatch.setattr(launch, "_flaws", {"cuda": "Triton failed: RuntimeError"})
    assert launch.path(torch.device("cuda"), 10**6) == "eager kernels (Triton failed: RuntimeError)"
    found.pop(0)
    assert launch.path(torch.device("cuda"), 10**6) == "eager kernels (Triton is not installed)"


class Doubled:
    """Twice the base."""

    is_sum = True

    def __call__(self, base: Tensor, rows: tuple[Tensor, ...], column: Tensor) -> Tensor:
        return base * column.T


def test_only_the_given_runs_are_written() -> None:
    out_P, base_P = torch.zeros(6 * BLOCK), torch.ones(6 * BLOCK)
    runs = [slice(1, 2), slice(4, 6)]
    launch.launch(Doubled(), out_P, runs, base_P, [], [torch.full((1, 6), 2.0)])
    assert out_P.view(6, BLOCK)[:, 0].tolist() == [0, 2, 0, 0, 2, 2]
