"""What every rule promises that trims task vectors, against twins that sort, draw and vote in float64.

The twins draw with a plain implementation of the hash of their own, so that they keep the same entries. Of tensors with
more than 16,384 elements, of which not all magnitudes are held, entries near a threshold are undecided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from golden import FLOAT32_ROUNDINGS, reference
from operator_contract import SEVERAL_CHUNKS, OperatorContract, Problem, TwinResult
from torch import Tensor

from evomerge.kernels.layout import BLOCK
from evomerge.operators.masks import ALL_ENTRIES, QUANTILES

Words = npt.NDArray[np.uint32]


def mixed(number: Words) -> Words:
    number = (number ^ (number >> 16)) * np.uint32(0x7FEB352D)
    number = (number ^ (number >> 15)) * np.uint32(0x846CA68B)
    return number ^ (number >> 16)


def keys(name: str, expert: int, num_blocks: int, seed: int) -> Words:
    """One word a block of a tensor; ``expert`` is its number, the number of experts for ties."""
    word = 0x811C9DC5
    for byte in name.encode():
        word = (word ^ byte) * 0x01000193 % 2**32
    tensor = mixed(np.array([(word + seed) % 2**32], dtype=np.uint32))
    blocks = mixed(tensor + np.arange(num_blocks, dtype=np.uint32))
    return mixed(blocks + mixed(np.array([expert + 1], dtype=np.uint32)))


def draws(name: str, expert: int, size: int, seed: int, *, tie: bool = False) -> Tensor:
    """Numbers of [0, 1), float64; those that decide ties run through every block in even steps."""
    places = np.arange(size, dtype=np.uint32)
    column, key = places % BLOCK, keys(name, expert, -(-size // BLOCK), seed)[places // BLOCK]
    words = column * np.uint32(2**32 - 1640531535) + key if tie else mixed(column ^ key)
    return torch.from_numpy((words ^ np.uint32(2**31)) / 2.0**32)


@dataclass(frozen=True)
class Place:
    """Which task vector is trimmed: the draws depend on it."""

    name: str
    expert: int
    num_experts: int


def largest(vector: Tensor, num_kept: int, place: Place) -> tuple[Tensor, Tensor]:
    """The largest so many entries by sorting: whether each is kept, and whether that is undecided."""
    size, magnitudes = vector.numel(), vector.flatten().abs()
    if num_kept in (0, size):
        return torch.full(vector.shape, num_kept > 0), torch.zeros(vector.shape, dtype=torch.bool)
    descending = magnitudes.sort(descending=True).values
    last, slack = descending[num_kept - 1], 2 * size // QUANTILES
    if size > ALL_ENTRIES:
        upper, lower = descending[max(num_kept - slack, 0)], descending[min(num_kept + slack, size - 1)]
        undecided = (magnitudes >= lower * (1 - 2**-10)) & (magnitudes <= upper * (1 + 2**-10))
    else:
        undecided = torch.zeros(size, dtype=torch.bool)
    ties = magnitudes == last
    share = (num_kept - int((magnitudes > last).sum())) / int(ties.sum())
    kept = (magnitudes > last) | (ties & (draws(place.name, place.num_experts, size, 0, tie=True) < share))
    return kept.view(vector.shape), undecided.view(vector.shape)


def magnitude_gain(vector: Tensor, kept_mass: float) -> float:
    whole = float(vector.double().abs().sum())
    return whole / kept_mass if min(whole, kept_mass) > 1e-7 else 1.0


class TrimmedContract(OperatorContract):
    """``trim`` says what is kept; elect, divide and none_at_zero how it is combined."""

    elect = "weighted"
    divide = "no"
    none_at_zero = False
    signed = False  # whether coefficients of both signs are drawn
    most_undecided = 0.3  # many entries of a large tensor in half precision tie at a threshold

    def trim(self, vector: Tensor, numbers: Mapping[str, float], place: Place) -> tuple[Tensor, Tensor]:
        """What is kept of a task vector, float64 and times its gain, and where that is undecided."""
        raise NotImplementedError

    def trim_all(
        self, vectors: Mapping[str, Tensor], numbers: Mapping[str, Sequence[float]], expert: int, num_experts: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: self.trim(
                vector, {key: float(row[s]) for key, row in numbers.items()}, Place(name, expert, num_experts)
            )
            for s, (name, vector) in enumerate(vectors.items())
        }

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        def draw(rows: int, low: float, high: float) -> Tensor:
            uniform = torch.rand((rows, num_tensors), generator=generator, dtype=torch.float64)
            return low + (high - low) * uniform

        coefficients, scale = draw(num_experts, 0.1, 1.0), draw(1, 0.3, 2.0)
        if self.signed:
            coefficients = torch.where(draw(num_experts, 0.0, 1.0) < 0.3, -0.1 * coefficients, coefficients)
        searched = {
            spec.name: draw(num_experts, spec.low, spec.high) for spec in self.make().parameters if spec.structural
        }
        return {"coefficient": coefficients, **searched, "scale": scale}

    def exact(self, problem: Problem) -> dict[str, TwinResult]:
        trimmed = [
            self.trim_all(
                {name: expert[name].float() - problem.base[name].float() for name in problem.base},
                {
                    spec.name: problem.values[spec.name][k].tolist()
                    for spec in self.make().parameters
                    if spec.structural
                },
                k,
                len(problem.experts),
            )
            for k, expert in enumerate(problem.experts)
        ]
        return {
            name: self.combine(
                base,
                [kept[name] for kept in trimmed],
                problem.values["coefficient"][:, s],
                problem.values["scale"][0, s],
            )
            for s, (name, base) in enumerate(problem.base.items())
        }

    def combine(
        self, base: Tensor, trimmed: Sequence[tuple[Tensor, Tensor]], weights_K: Tensor, scale: Tensor
    ) -> TwinResult:
        entries = torch.stack([kept for kept, _ in trimmed])
        undecided = torch.stack([open_ for _, open_ in trimmed]).any(0)
        weights = weights_K.float().double().view(-1, *(1,) * base.ndim)
        if self.elect == "no" and self.divide == "weights":
            weights = weights / weights.sum()
        terms = weights * entries
        spread = terms.abs().sum(0)
        consensus = terms.sum(0)
        if self.elect != "no":
            sides = {"weighted": terms, "unweighted": entries, "count": terms.sign()}[self.elect]
            vote = sides.sum(0)
            undecided = undecided | ((vote.abs() <= len(entries) * 2.0**-23 * sides.abs().sum(0)) & (vote != 0))
            elected = vote.sign() if self.none_at_zero else torch.where(vote >= 0, 1.0, -1.0)
            agrees = sides * elected > 0
            consensus = (terms * agrees).sum(0)
            if self.divide != "no":
                divisor = ((weights if self.divide == "weights" else torch.ones_like(weights)) * agrees).sum(0)
                consensus = consensus / torch.where(divisor == 0, 1.0, divisor)
        magnitude = base.double().abs() + abs(scale) * torch.maximum(spread, consensus.abs())
        return TwinResult(base.double() + scale * consensus, magnitude, undecided)


class DrawnContract(TrimmedContract):
    """Of trims by draws of a seed."""

    seed = 0

    def test_the_order_of_experts_is_irrelevant(self) -> None:
        pytest.skip("the draws go by an expert's number")


class SortedSumContract(TrimmedContract):
    """Of sums of what is kept by size, whose gradient goes through the very entries that were kept."""

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        """Of a large tensor all is kept: the tables are not exact otherwise; see ``test_masks.py``."""
        problem = super().problem(sizes, dtype, num_experts, seed)
        if tuple(sizes) != SEVERAL_CHUNKS:
            return problem
        return replace(problem, values={**problem.values, "density": torch.ones_like(problem.values["density"])})


def golden_problem(name: str, checkpoints: Sequence[str], rows: Mapping[str, Sequence[float] | Tensor]) -> Problem:
    """A reference's merge; ``rows`` holds a number an expert, or one an expert and tensor (K, S)."""
    names = list(reference(name))
    base, *experts = ({tensor: held[tensor] for tensor in names} for held in map(reference, ("base", *checkpoints)))
    values = {}
    for parameter, row in rows.items():
        matrix = torch.as_tensor(row, dtype=torch.float64)
        values[parameter] = matrix if matrix.ndim == 2 else matrix[:, None].expand(-1, len(names)).contiguous()
    return Problem(base, experts, {**values, "scale": torch.ones(1, len(names), dtype=torch.float64)})


def flat_matrices(named: Mapping[str, Tensor]) -> Tensor:
    """The matrices' entries one after the other, float64."""
    return torch.cat([tensor.flatten().double() for tensor in named.values() if tensor.ndim == 2])


def assert_equals_mergekit(name: str, problem: Problem, merged: Mapping[str, Tensor], gain: float = 1.0) -> None:
    """Other entries kept, or other signs elected, would be off by whole entries of the task vectors (0.02).

    gain: the largest factor on an entry, with which the roundings grow.
    """
    for tensor, expected in reference(name).items():
        checkpoints = torch.stack([held[tensor] for held in (problem.base, *problem.experts)])
        assert ((merged[tensor] - expected).abs() <= FLOAT32_ROUNDINGS * gain * checkpoints.abs().sum(0)).all()
        assert not torch.equal(expected, problem.base[tensor])
