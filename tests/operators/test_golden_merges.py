"""Parity with mergekit; ``tests/golden/README.md`` says how the references were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from operator_contract import Problem, merge
from safetensors.torch import load_file
from torch import Tensor

from evomerge.operators.linear import Linear, LinearOptions, TaskArithmetic
from evomerge.operators.model_stock import ModelStock
from evomerge.operators.operator import Operator
from evomerge.operators.spherical import Karcher, MultiSlerp, MultiSlerpOptions, NuSlerp, NuSlerpOptions, Slerp

GOLDEN = Path(__file__).parents[1] / "golden"
BASE, *EXPERTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("base", "v1", "v2", "v3"))


def read(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def problem(coefficients: Sequence[float] | Tensor, reference: Mapping[str, Tensor], dtype: torch.dtype) -> Problem:
    """The tensors of the reference, in its order, with one coefficient an expert (or one an expert and tensor)."""
    base, *experts = ({name: held[name].to(dtype) for name in reference} for held in (BASE, *EXPERTS))
    column = torch.as_tensor(coefficients, dtype=torch.float64)
    matrix_KS = column if column.ndim == 2 else column[:, None].expand(-1, len(base))
    return Problem(base, experts, {"coefficient": matrix_KS})


def terms(held: Problem, weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of the absolute terms, what rounding errors scale with."""
    total = {name: tensor.double().abs() for name, tensor in held.base.items()}
    for weight, expert in zip(weights, held.experts, strict=True):
        total = {
            name: total[name] + abs(weight) * (expert[name].double().abs() + held.base[name].abs()) for name in total
        }
    return total


# In float32 mergekit sums task vectors (or experts) and we sum experts with the base's weight taken together: the same
# terms in another order, so a few float32 roundings (2^-24 each) of the sum of the terms' magnitudes lie between us.
FLOAT32_ROUNDINGS = 6 * 2.0**-24


@pytest.mark.parametrize(
    ("name", "operator", "weights"),
    [
        ("linear_a", Linear(), (0.5, 0.3, 0.4)),
        ("linear_a", Linear(LinearOptions(normalize=False)), (0.5 / 1.2, 0.3 / 1.2, 0.4 / 1.2)),
        ("task_arithmetic_a", TaskArithmetic(), (0.5, 0.3, -0.2)),
    ],
)
def test_linear_merges_in_float32(name: str, operator: Operator, weights: tuple[float, ...]) -> None:
    reference = read(name)
    held = problem(weights, reference, torch.float32)
    merged, magnitude = merge(operator, held), terms(held, weights)
    assert len(reference) == 11
    for tensor, expected in reference.items():
        assert ((merged[tensor].double() - expected.double()).abs() <= FLOAT32_ROUNDINGS * magnitude[tensor]).all()


def test_a_coefficient_a_layer_gives_mergekits_slices() -> None:
    reference = read("slices_linear_per_slice")
    of_layer = {"0": (0.8, 0.2), "1": (0.8, 0.2), "2": (0.1, 0.3), "3": (0.1, 0.9)}
    outside = {
        "model.embed_tokens.weight": of_layer["0"],
        "model.norm.weight": of_layer["2"],
        "lm_head.weight": of_layer["2"],
    }
    columns = [outside.get(name) or of_layer[name.split(".")[2]] for name in reference]
    matrix_KS = torch.tensor([[*column, 0.0] for column in columns], dtype=torch.float64).T
    held = problem(matrix_KS, reference, torch.float32)
    merged, magnitude = merge(Linear(), held), terms(held, (1.0, 1.0, 0.0))
    for tensor, expected in reference.items():
        assert ((merged[tensor].double() - expected.double()).abs() <= FLOAT32_ROUNDINGS * magnitude[tensor]).all()


def test_a_float32_merge_is_rounded_once_to_bfloat16() -> None:
    """mergekit's out_dtype: computed in float32, rounded at the end. Only near-ties of the rounding may differ."""
    reference = read("bf16_out_only_task_arithmetic")
    held = problem((0.5, 0.3, -0.2), reference, torch.float32)
    merged = merge(TaskArithmetic(), held, out_dtype=torch.bfloat16)
    differing = sum(int((merged[tensor] != expected).sum()) for tensor, expected in reference.items())
    assert differing <= 1e-3 * sum(expected.numel() for expected in reference.values())
    for tensor, expected in reference.items():
        step = 2.0**-7 * expected.double().abs() + 1e-30
        assert ((merged[tensor].double() - expected.double()).abs() <= step).all()


@pytest.mark.parametrize(
    ("name", "operator", "weights", "divisor"),
    [
        ("bf16_linear", Linear(), (0.5, 0.3, 0.4), 1.2),
        ("bf16_task_arithmetic", TaskArithmetic(), (0.5, 0.3, -0.2), 1.0),
    ],
)
def test_bfloat16_differs_by_mergekits_own_roundings(
    name: str, operator: Operator, weights: tuple[float, ...], divisor: float
) -> None:
    """mergekit computes in bfloat16 (the coefficients too: 0.3 is 0.30078), we sum in float32 and round once.

    Each of its operations errs by 2^-8 of what it works on: a coefficient, a task vector, a product, up to three sums
    and a division or addition of the base, so at most eight of the terms' magnitude lie between us. Our own
    distance to the exact result is one rounding, and smaller than mergekit's on average.
    """
    reference = read(name)
    held = problem(weights, reference, torch.bfloat16)
    merged, magnitude = merge(operator, held), terms(held, weights)
    our_error, their_error = [], []
    for tensor, expected in reference.items():
        ours, theirs = merged[tensor].double(), expected.double()
        base, experts = held.base[tensor].double(), [expert[tensor].double() for expert in held.experts]
        exact = sum(weight * expert for weight, expert in zip(weights, experts, strict=True)) / divisor
        if name == "bf16_task_arithmetic":
            exact = exact + (1 - sum(weights)) * base
        assert ((ours - theirs).abs() <= 8 * 2.0**-8 * magnitude[tensor]).all()
        assert ((ours - exact).abs() <= 2.0**-8 * exact.abs() + FLOAT32_ROUNDINGS * magnitude[tensor]).all()
        our_error.append((ours - exact).abs().flatten())
        their_error.append((theirs - exact).abs().flatten())
    assert torch.cat(our_error).mean() < torch.cat(their_error).mean()


# mergekit finds angles and lengths in float32, from inner products whose terms nearly cancel; they move whole tensors by
# a few float32 roundings. Relative to the tensor's norm 2.8e-7 at most was measured over all 39 tensors of each.
FLOAT32_ANGLES = 6e-7


@pytest.mark.parametrize(
    ("name", "operator", "base", "experts", "coefficients"),
    [
        ("slerp_a", Slerp(), "v1", ("v2",), (0.4,)),
        ("nuslerp_a", NuSlerp(NuSlerpOptions(relative=False)), "base", ("v1", "v2"), (0.6, 0.4)),
        ("nuslerp_b_base_rows", NuSlerp(NuSlerpOptions(vectors="rows")), "base", ("v1", "v2"), ([0.2, 0.9], 0.5)),
        ("multislerp_a", MultiSlerp(MultiSlerpOptions(relative=False)), "base", ("v1", "v2", "v3"), (0.5, 0.3, 0.4)),
        ("karcher_a", Karcher(), "base", ("v1", "v2", "v3"), (1.0, 1.0, 1.0)),
        ("model_stock_a", ModelStock(), "base", ("v1", "v2", "v3"), ()),
    ],
)
def test_spherical_merges_in_float32(
    name: str, operator: Operator, base: str, experts: Sequence[str], coefficients: Sequence[float | Sequence[float]]
) -> None:
    """Norm weights lie within slerp's straight lines and matrices do not; some cosines of model_stock are negative."""
    reference = read(name)
    held = {key: {tensor: read(key)[tensor] for tensor in reference} for key in (base, *experts)}
    depth = torch.tensor([int(name.split(".")[2]) / 3 if ".layers." in name else 0.0 for name in reference]).double()
    rows = [(ends if isinstance(ends, list) else [ends, ends]) for ends in coefficients]
    values = {"coefficient": torch.stack([low + (high - low) * depth for low, high in rows])} if rows else {}
    values["scale"] = torch.ones(1, len(reference), dtype=torch.float64)
    merged = merge(operator, Problem(held[base], [held[expert] for expert in experts], values))
    assert len(reference) == 12
    for tensor, expected in reference.items():
        apart = (merged[tensor].double() - expected.double()).norm()
        assert float(apart) <= FLOAT32_ANGLES * float(expected.double().norm())
