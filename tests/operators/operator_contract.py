"""What every operator promises; a test class of an operator inherits ``OperatorContract`` and gives it a slow twin.

A problem holds plain dicts of tensors. ``merge`` lays them out as the kernels want them (each tensor on a block of its
own, zero padding) by its own code, and runs the operator. A twin works tensor by tensor in float64.
Shape letters: K experts, S tensors, P padded elements, B blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.operators.kernels import BLOCK, CHUNK_BLOCKS, task_vector_products
from evomerge.operators.operator import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_SIZES = (1, 1023, 1024, 1025, 7)
SEVERAL_CHUNKS = (3, CHUNK_BLOCKS * BLOCK + 1500, 5)
# An inherited property runs in every class that inherits it, on examples of its own: nothing is shared or replayed.
inherited = settings(
    max_examples=20, deadline=None, database=None, suppress_health_check=[HealthCheck.differing_executors]
)
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a rounding, relative


@dataclass(frozen=True)
class Problem:
    """Base, experts and the (K, S) values of an operator's parameters."""

    base: Mapping[str, Tensor]
    experts: Sequence[Mapping[str, Tensor]]
    values: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.base.values())).dtype

    def reordered(self, order: Sequence[int]) -> "Problem":
        """The same merge with its experts named in another order."""
        rows = list(order)
        values = {name: matrix[rows] if len(matrix) > 1 else matrix for name, matrix in self.values.items()}
        return replace(self, experts=[self.experts[k] for k in rows], values=values)


@dataclass(frozen=True)
class TwinResult:
    """merged: the exact result in float64. magnitude: the sum of the absolute terms, what rounding errors scale with.

    undecided: where a float32 sum and the exact one may differ in sign, so that an election may go either way.
    """

    merged: Tensor
    magnitude: Tensor
    undecided: Tensor


Twin = Callable[[Tensor, Sequence[Tensor], Mapping[str, Tensor]], TwinResult]
"""(base, experts, values (K,) of this tensor) -> result, for one tensor."""


@dataclass(frozen=True)
class Flat:
    """A problem in flat buffers."""

    base_P: Tensor
    experts_KP: Tensor
    segments: list[slice]
    block_segment: Tensor


def lay_out(problem: Problem) -> Flat:
    segments, blocks, start = [], [], 0
    for s, tensor in enumerate(problem.base.values()):
        num_blocks = (tensor.numel() + BLOCK - 1) // BLOCK
        segments.append(slice(start, start + tensor.numel()))
        blocks += [s] * num_blocks
        start += num_blocks * BLOCK

    def flatten(named: Mapping[str, Tensor]) -> Tensor:
        buffer_P = torch.zeros(start, dtype=problem.dtype)
        for name, segment in zip(problem.base, segments, strict=True):
            buffer_P[segment] = named[name].flatten()
        return buffer_P

    experts_KP = torch.stack([flatten(expert) for expert in problem.experts])
    return Flat(flatten(problem.base), experts_KP, segments, torch.tensor(blocks))


def merge(operator: Operator, problem: Problem, out_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Run the operator over flat buffers; the padding must come out as zero whatever lay in the output before."""
    flat = lay_out(problem)
    out_P = torch.full_like(flat.base_P, float("nan"), dtype=out_dtype or problem.dtype)
    before = flat.base_P.clone(), flat.experts_KP.clone()
    state = operator.prepare(flat.base_P, flat.experts_KP, flat.segments, problem.values, None)
    weights_KB = operator.weights(problem.values)[:, flat.block_segment]
    operator.merge(out_P, flat.base_P, flat.experts_KP, weights_KB, state)
    assert torch.equal(flat.base_P, before[0]), "the base was written to"
    assert torch.equal(flat.experts_KP, before[1]), "an expert was written to"
    padding = torch.ones(len(out_P), dtype=torch.bool)
    for segment in flat.segments:
        padding[segment] = False
    assert not out_P[padding].any(), "the padding must stay zero"
    return {
        name: out_P[segment].view(problem.base[name].shape)
        for name, segment in zip(problem.base, flat.segments, strict=True)
    }


def assert_rounded_once(merged: Tensor, exact: TwinResult, num_experts: int) -> None:
    """Assert that ``merged`` is the exact result, off by float32 sums over K + 1 terms and one rounding to its dtype.

    Each float32 product or sum, and each coefficient's own rounding, errs by 2^-24 of the terms' magnitude.
    """
    accumulation = 4 * (num_experts + 1) * 2.0**-24 * exact.magnitude
    smallest = torch.finfo(merged.dtype).smallest_normal * torch.finfo(merged.dtype).eps  # a subnormal's step
    bound = accumulation + HALF_STEP[merged.dtype] * exact.merged.abs() + smallest
    wrong = ((merged.double() - exact.merged).abs() > bound) & ~exact.undecided
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than a rounding"
    assert exact.undecided.double().mean() < 0.05


class OperatorContract:
    """make, coefficients and twin say what is tested."""

    normalize: bool | None = None

    def make(self) -> Operator:
        raise NotImplementedError

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        raise NotImplementedError

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values within what the operator accepts."""
        shape = (num_experts, num_tensors)
        return {"coefficient": torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1}

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        base = {f"t{s}": torch.randn(size, generator=generator).to(dtype) for s, size in enumerate(sizes)}
        experts = [
            {
                name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)
                for name, tensor in base.items()
            }
            for _ in range(num_experts)
        ]
        return Problem(base, experts, self.draw_values(num_experts, len(sizes), generator))

    def exact(self, problem: Problem) -> dict[str, TwinResult]:
        return {
            name: self.twin(
                tensor,
                [expert[name] for expert in problem.experts],
                {parameter: matrix[:, s] for parameter, matrix in problem.values.items()},
            )
            for s, (name, tensor) in enumerate(problem.base.items())
        }

    def check(self, problem: Problem) -> None:
        merged, exact = merge(self.make(), problem), self.exact(problem)
        for name in problem.base:
            assert_rounded_once(merged[name], exact[name], len(problem.experts))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_experts", [1, 2, 5])
    def test_equals_the_twin(self, dtype: torch.dtype, num_experts: int) -> None:
        self.check(self.problem(ODD_SIZES, dtype, num_experts, seed=num_experts))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_twin_over_several_chunks(self, dtype: torch.dtype) -> None:
        self.check(self.problem(SEVERAL_CHUNKS, dtype, num_experts=2))

    @given(
        sizes=st.lists(st.integers(1, 2100), min_size=1, max_size=4),
        num_experts=st.integers(1, 4),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    )
    @inherited
    def test_equals_the_twin_whatever_the_sizes(
        self, sizes: list[int], num_experts: int, dtype: torch.dtype, seed: int
    ) -> None:
        self.check(self.problem(sizes, dtype, num_experts, seed))

    @given(order=st.permutations(range(4)), seed=st.integers(0, 2**31))
    @inherited
    def test_the_order_of_experts_is_irrelevant(self, order: list[int], seed: int) -> None:
        problem = self.problem((300, 1030), num_experts=4, seed=seed)
        one, other = merge(self.make(), problem), merge(self.make(), problem.reordered(order))
        for name, exact in self.exact(problem).items():
            apart = (one[name].double() - other[name].double()).abs() > 40 * 2.0**-24 * exact.magnitude
            assert not (apart & ~exact.undecided).any()

    def test_merging_again_gives_the_same_bits(self) -> None:
        problem = self.problem(ODD_SIZES, torch.bfloat16)
        one, other = merge(self.make(), problem), merge(self.make(), problem)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_each_tensor_takes_its_own_column(self) -> None:
        """Changing one tensor's coefficients changes that tensor and no other."""
        problem = self.problem((1025, 1025, 1025))
        changed = problem.values["coefficient"].clone()
        changed[0, 1] += 0.07
        one = merge(self.make(), problem)
        other = merge(self.make(), replace(problem, values={**problem.values, "coefficient": changed}))
        assert [torch.equal(one[name], other[name]) for name in one] == [True, False, True]

    def test_parameters_can_be_searched_as_they_say(self) -> None:
        parameters = self.make().parameters
        assert parameters[0].name == "coefficient"
        assert len({spec.name for spec in parameters}) == len(parameters)
        for spec in parameters:
            assert spec.minimum <= spec.low < spec.high <= spec.maximum
            assert spec.minimum <= spec.default <= spec.maximum
            assert spec.meaning

    def test_options_are_strict(self) -> None:
        operator = self.make()
        with pytest.raises(ValueError, match="no_such_option"):
            operator.options_type.model_validate({"no_such_option": 1})
        assert operator.options_type.model_validate(operator.options.model_dump()) == operator.options


class DifferentiableContract(OperatorContract):
    """What holds beyond that for operators that are linear in their weights."""

    def test_it_says_that_it_is_differentiable(self) -> None:
        assert self.make().differentiable

    @pytest.mark.parametrize("sizes", [ODD_SIZES, SEVERAL_CHUNKS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradient_equals_autograd_through_the_twin(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        problem = self.problem(sizes, dtype)
        generator = torch.Generator().manual_seed(1)
        loss_gradient = {name: torch.randn(t.shape, generator=generator) for name, t in problem.base.items()}
        ours = self._gradient(problem, loss_gradient)

        explicit = {name: matrix.clone().requires_grad_(True) for name, matrix in problem.values.items()}
        loss = self._loss(replace(problem, values=explicit), loss_gradient)
        loss.backward()
        for name, matrix in explicit.items():
            assert matrix.grad is not None
            # float32 inner products over up to 262,144 elements, summed in float64 from chunk to chunk
            torch.testing.assert_close(ours[name], matrix.grad, rtol=2e-4, atol=2e-3)

    def test_gradient_equals_finite_differences(self) -> None:
        problem = self.problem((5, 1025), num_experts=2)
        generator = torch.Generator().manual_seed(2)
        loss_gradient = {name: torch.randn(t.shape, generator=generator) for name, t in problem.base.items()}
        ours = self._gradient(problem, loss_gradient)["coefficient"]
        for k in range(2):
            for s in range(2):
                step = torch.zeros(2, 2, dtype=torch.float64)
                step[k, s] = 1e-4
                above, below = (
                    self._loss(
                        replace(problem, values={"coefficient": problem.values["coefficient"] + sign * step}),
                        loss_gradient,
                    )
                    for sign in (1, -1)
                )
                assert float(ours[k, s]) == pytest.approx(float(above - below) / 2e-4, rel=1e-4, abs=1e-4)

    def _gradient(self, problem: Problem, loss_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The house's way: inner products per tensor, pulled back through the operator's weights."""
        flat = lay_out(problem)
        values: dict[str, Any] = {name: matrix.clone().requires_grad_(True) for name, matrix in problem.values.items()}
        products_KS = torch.stack(
            [
                task_vector_products(gradient.flatten(), flat.base_P[segment], flat.experts_KP[:, segment])
                for gradient, segment in zip(loss_gradient.values(), flat.segments, strict=True)
            ],
            dim=1,
        )
        self.make().weights(values).backward(products_KS)
        return {name: matrix.grad for name, matrix in values.items()}

    def _loss(self, problem: Problem, loss_gradient: Mapping[str, Tensor]) -> Tensor:
        exact = self.exact(problem)
        return torch.stack([(exact[name].merged * loss_gradient[name].double()).sum() for name in exact]).sum()
