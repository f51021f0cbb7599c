"""mergekit's reference merges as problems; ``tests/golden/README.md`` says how they were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from operator_contract import Problem
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"

# The same terms are summed in another order, so a few float32 roundings (2^-24 each) of the sum of their magnitudes lie
# between mergekit and us. Were other entries kept or other signs elected, whole task vectors (0.02) would.
FLOAT32_ROUNDINGS = 6 * 2.0**-24


def reference(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_problem(
    name: str, values: Mapping[str, float], checkpoints: Sequence[str] = ("base", "v1", "v2", "v3")
) -> Problem:
    """The merge of a reference's tensors, with one number a parameter."""
    names = list(reference(name))
    base, *experts = ({tensor: held[tensor] for tensor in names} for held in map(reference, checkpoints))
    matrices = {
        parameter: torch.full((1, len(names)), value, dtype=torch.float64) for parameter, value in values.items()
    }
    return Problem(base, experts, matrices)


def differs(merged: Tensor, expected: Tensor, checkpoints: Sequence[Tensor]) -> Tensor:
    """Where two merges of these checkpoints' tensors are farther apart than float32 roundings of the terms."""
    magnitude = torch.stack([tensor.abs() for tensor in checkpoints]).sum(0)
    return (merged - expected).abs() > FLOAT32_ROUNDINGS * magnitude


def assert_equals_mergekit(name: str, problem: Problem, merged: Mapping[str, Tensor]) -> None:
    for tensor, expected in reference(name).items():
        checkpoints = [held[tensor] for held in (problem.base, *problem.experts)]
        assert not differs(merged[tensor], expected, checkpoints).any()
        assert not torch.equal(expected, problem.base[tensor])
