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

from evomerge.kernels.launch import CHUNK_BLOCKS
from evomerge.kernels.layout import BLOCK, Layout
from evomerge.kernels.lincomb import task_vector_products
from evomerge.kernels.sources import Dense, Expert, LowRank, Sources
from evomerge.materialize.residence import to_int8
from evomerge.operators.operator import LinearOperator, Operator
from evomerge.records import TensorInfo

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_SIZES = (1, 1023, 1024, 1025, 7)
SEVERAL_CHUNKS = (3, CHUNK_BLOCKS * BLOCK + 1500, 5)
# An inherited property runs in every class that inherits it, on examples of its own: nothing is shared or replayed.
inherited = settings(max_examples=20, database=None, suppress_health_check=[HealthCheck.differing_executors])
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a rounding, relative


@dataclass(frozen=True)
class Factors:
    """An adapter's part of a matrix: the task vector is scaling * b @ a, float32."""

    b: Tensor
    a: Tensor
    scaling: float


@dataclass(frozen=True)
class Problem:
    """Base, experts and the (K, S) values of an operator's parameters. An adapter maps names to ``Factors``."""

    base: Mapping[str, Tensor]
    experts: Sequence[Mapping[str, Any]]
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
    cached: the sum of the absolute terms that ``prepare`` keeps in the model's dtype, rounded once more.
    """

    merged: Tensor
    magnitude: Tensor
    undecided: Tensor
    cached: Tensor | float = 0.0


Twin = Callable[[Tensor, Sequence[Tensor], Mapping[str, Tensor]], TwinResult]
"""(base, experts, values (K,) of this tensor) -> result, for one tensor."""


def matrix_shape(size: int) -> tuple[int, ...]:
    """The most nearly square matrix of so many elements, or a vector if there is none."""
    rows = next(rows for rows in range(int(size**0.5), 0, -1) if size % rows == 0)
    return (rows, size // rows) if rows > 1 else (size,)


def lines_of(tensor: Tensor, vectors: str) -> list[Tensor]:
    """The rows or the columns of a matrix; a vector, or with "tensor" anything, as one."""
    if vectors == "tensor" or tensor.ndim < 2:
        return [tensor.flatten()]
    matrix = tensor.flatten(1)
    return list(matrix if vectors == "rows" else matrix.T)


def as_task_vectors(sources: Sources, form: str) -> Sources:
    """The same sources, checkpoints held as task vectors: in their own dtype, or in ``int8``."""
    dense = [expert for expert in sources.experts if isinstance(expert, Dense)]
    if form == "int8":
        return replace(sources, experts=tuple(to_int8(expert, sources.base_P) for expert in dense))
    vectors = (Dense(expert.buffer_P - sources.base_P, is_task_vector=True) for expert in dense)
    return replace(sources, experts=tuple(vectors))


def lay_out(problem: Problem) -> Sources:
    layout = Layout.of(tuple(TensorInfo(name, tuple(tensor.shape)) for name, tensor in problem.base.items()))

    def flatten(named: Mapping[str, Tensor]) -> Tensor:
        buffer_P = torch.zeros(layout.num_padded, dtype=problem.dtype)
        for name, segment in zip(problem.base, layout.segments, strict=True):
            buffer_P[segment] = named[name].flatten()
        return buffer_P

    def hold(expert: Mapping[str, Any]) -> Expert:
        factors = {s: expert[name] for s, name in enumerate(problem.base) if isinstance(expert.get(name), Factors)}
        if not factors:
            return Dense(flatten(expert))
        return LowRank(
            {s: (held.b * held.scaling, held.a) for s, held in factors.items()},
            {s: held.scaling for s, held in factors.items()},
        )

    return Sources(layout, flatten(problem.base), tuple(map(hold, problem.experts)))


def merge(operator: Operator, problem: Problem, out_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Run the operator over flat buffers; the padding must come out as zero whatever lay in the output before."""
    sources = lay_out(problem)
    buffers = [sources.base_P, *(expert.buffer_P for expert in sources.experts if isinstance(expert, Dense))]
    out_P = torch.full_like(sources.base_P, float("nan"), dtype=out_dtype or problem.dtype)
    before = [buffer_P.clone() for buffer_P in buffers]
    state = operator.prepare(sources, problem.values, None)
    operator.merge(out_P, sources, operator.weights(problem.values, state), state)
    assert all(map(torch.equal, buffers, before)), "the base or an expert was written to"
    padding = torch.ones(len(out_P), dtype=torch.bool)
    for segment in sources.layout.segments:
        padding[segment] = False
    assert not out_P[padding].any(), "the padding must stay zero"
    return {
        name: out_P[segment].view(problem.base[name].shape)
        for name, segment in zip(problem.base, sources.layout.segments, strict=True)
    }


def assert_rounded_once(merged: Tensor, exact: TwinResult, num_experts: int, most_undecided: float = 0.05) -> None:
    """Assert that ``merged`` is the exact result, off by float32 sums over K + 1 terms and one rounding to its dtype.

    Each float32 product or sum, and each coefficient's own rounding, errs by 2^-24 of the terms' magnitude.
    """
    accumulation = 4 * (num_experts + 1) * 2.0**-24 * exact.magnitude
    smallest = torch.finfo(merged.dtype).smallest_normal * torch.finfo(merged.dtype).eps  # a subnormal's step
    bound = accumulation + HALF_STEP[merged.dtype] * (exact.merged.abs() + 2 * exact.cached) + smallest
    wrong = ((merged.double() - exact.merged).abs() > bound) & ~exact.undecided
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than a rounding"
    assert int(exact.undecided.sum()) <= 3 + most_undecided * merged.numel()  # of a few entries, all may tie


class OperatorContract:
    """make, draw_values and twin say what is tested; shape what tensors look like, fewest and most how many experts."""

    normalize: bool | None = None
    fewest, most = 1, 5
    most_undecided = 0.05  # of a tensor's elements

    def make(self) -> Operator:
        raise NotImplementedError

    def twin(self, base: Tensor, experts: Sequence[Tensor], values: Mapping[str, Tensor]) -> TwinResult:
        raise NotImplementedError

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values within what the operator accepts."""
        shape = (num_experts, num_tensors)
        return {"coefficient": torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1}

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of a problem's tensor of so many elements."""
        return (size,)

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        """Random tensors; with the nearest number of experts that the operator can merge."""
        num_experts = min(max(num_experts, self.fewest), self.most)
        generator = torch.Generator().manual_seed(seed)
        base = {f"t{s}": torch.randn(self.shape(size), generator=generator).to(dtype) for s, size in enumerate(sizes)}
        experts = [
            {
                name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)
                for name, tensor in base.items()
            }
            for _ in range(num_experts)
        ]
        return Problem(base, experts, self.draw_values(num_experts, len(sizes), generator))

    def first_parameter(self) -> str:
        if not self.make().parameters:
            pytest.skip("the operator has nothing to set")
        return self.make().parameters[0].name

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
            assert_rounded_once(merged[name], exact[name], len(problem.experts), self.most_undecided)

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
        order = [k for k in order if k < len(problem.experts)]
        one, other = merge(self.make(), problem), merge(self.make(), problem.reordered(order))
        for name, exact in self.exact(problem).items():
            apart = (one[name].double() - other[name].double()).abs() > 40 * 2.0**-24 * exact.magnitude
            assert not (apart & ~exact.undecided).any()

    def test_merging_again_gives_the_same_bits(self) -> None:
        problem = self.problem(ODD_SIZES, torch.bfloat16)
        one, other = merge(self.make(), problem), merge(self.make(), problem)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_each_tensor_takes_its_own_column(self) -> None:
        """Changing one tensor's numbers changes that tensor and no other."""
        problem, name = self.problem((1025, 1025, 1025)), self.first_parameter()
        changed = problem.values[name].clone()
        changed[0, 1] += 0.07
        one = merge(self.make(), problem)
        other = merge(self.make(), replace(problem, values={**problem.values, name: changed}))
        assert [torch.equal(one[name], other[name]) for name in one] == [True, False, True]

    def test_rebuilding_what_changed_gives_the_bits_of_a_whole_merge(self) -> None:
        """A local operator writes the changed tensors and no others."""
        operator, name = self.make(), self.first_parameter()
        if not operator.local:
            pytest.skip("every tensor depends on all values")
        problem = self.problem((1025, 3000, 7, 1024))
        other = {**problem.values, name: problem.values[name].clone()}
        other[name][:, [0, 2]] *= 0.9
        changed = replace(problem, values=other)
        sources, whole = lay_out(problem), merge(operator, changed)
        out_P = torch.full_like(sources.base_P, 7.0)
        state = operator.prepare(sources, other, None)
        operator.merge(out_P, sources, operator.weights(other, state), state, [0, 2])
        for s, (name, segment) in enumerate(zip(problem.base, sources.layout.segments, strict=True)):
            expected = whole[name] if s in (0, 2) else torch.full_like(whole[name], 7.0)
            assert torch.equal(out_P[segment].view(expected.shape), expected)

    def test_parameters_can_be_searched_as_they_say(self) -> None:
        parameters = self.make().parameters
        assert "coefficient" not in [spec.name for spec in parameters[1:]]
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
    """What holds beyond that for operators that are linear in their weights.

    gradient_tolerance: float32 inner products over up to 262,144 elements, summed in float64 from chunk to chunk.
    """

    gradient_tolerance = 2e-3

    def cheap(self) -> list[str]:
        """The parameters that have a gradient: a structural one is part of what is weighed."""
        return [spec.name for spec in self.make().parameters if not spec.structural]

    def test_it_says_that_it_is_differentiable(self) -> None:
        assert self.make().differentiable

    @pytest.mark.parametrize("sizes", [ODD_SIZES, SEVERAL_CHUNKS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradient_equals_autograd_through_the_twin(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        problem = self.problem(sizes, dtype)
        loss_gradient = self._loss_gradient(problem)
        ours = self._gradient(problem, loss_gradient)

        explicit = {name: matrix.clone().requires_grad_(True) for name, matrix in problem.values.items()}
        loss = self._loss(replace(problem, values=explicit), loss_gradient)
        loss.backward()
        for name in self.cheap():
            matrix = explicit[name]
            assert matrix.grad is not None
            torch.testing.assert_close(ours[name], matrix.grad, rtol=2e-4, atol=self.gradient_tolerance)

    def test_gradient_equals_finite_differences(self) -> None:
        problem = self.problem((5, 1025), num_experts=2)
        loss_gradient = self._loss_gradient(problem)
        ours = self._gradient(problem, loss_gradient)
        for name in self.cheap():
            matrix = problem.values[name]
            for place in range(matrix.numel()):
                step = torch.zeros_like(matrix)
                step.view(-1)[place] = 1e-4
                above, below = (
                    self._loss(replace(problem, values={**problem.values, name: matrix + sign * step}), loss_gradient)
                    for sign in (1, -1)
                )
                slope = float(above - below) / 2e-4
                assert float(ours[name].view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-4)

    def _gradient(self, problem: Problem, loss_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The house's way: inner products per tensor, pulled back through the operator's weights."""
        sources, operator = lay_out(problem), self.make()
        assert isinstance(operator, LinearOperator)
        values: dict[str, Any] = {name: matrix.clone().requires_grad_(True) for name, matrix in problem.values.items()}
        state = operator.prepare(sources, problem.values, None)
        directions = operator.directions(sources, state)
        products_KS = torch.stack(
            [task_vector_products(g.flatten(), directions, s) for s, g in enumerate(loss_gradient.values())], dim=1
        )
        operator.weights(values, state).backward(products_KS)
        return {name: matrix.grad for name, matrix in values.items()}

    def _loss_gradient(self, problem: Problem) -> dict[str, Tensor]:
        """Random, and 0 where the twin and we may decide otherwise."""
        generator = torch.Generator().manual_seed(1)
        exact = self.exact(problem)
        return {
            name: torch.randn(tensor.shape, generator=generator) * ~exact[name].undecided
            for name, tensor in problem.base.items()
        }

    def _loss(self, problem: Problem, loss_gradient: Mapping[str, Tensor]) -> Tensor:
        exact = self.exact(problem)
        return torch.stack([(exact[name].merged * loss_gradient[name].double()).sum() for name in exact]).sum()
