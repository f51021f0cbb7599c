"""PEFT's combinations of adapters: against slow twins, against what PEFT computed, and DARE's draws by statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_contract import DifferentiableContract, Factors, OperatorContract, Problem, TwinResult, lay_out, merge
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import CampaignError, CandidateError
from evomerge.kernels.layout import Layout
from evomerge.kernels.sources import LowRank, Sources
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.lora import Lora, LoraOptions
from evomerge.operators.operator import Operator
from evomerge.records import TensorInfo

RANK = 2


def decided(merged: Tensor, magnitude: Tensor) -> TwinResult:
    return TwinResult(merged, magnitude, torch.zeros_like(merged, dtype=torch.bool))


class AdapterContract(OperatorContract):
    """The contract for experts that are adapters: every tensor is a matrix, as square as its size allows."""

    def shape(self, size: int) -> tuple[int, ...]:
        rows = max(divisor for divisor in range(1, int(size**0.5) + 1) if size % divisor == 0)
        return rows, size // rows

    def problem(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0
    ) -> Problem:
        problem = super().problem(sizes, dtype, num_experts, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        experts = [
            {
                name: Factors(
                    0.3 * torch.randn(tensor.shape[0], RANK, generator=generator),
                    0.3 * torch.randn(RANK, tensor.shape[1], generator=generator),
                    (2.0, 0.5, 1.5)[k % 3],
                )
                for name, tensor in problem.base.items()
            }
            for k in range(len(problem.experts))
        ]
        return replace(problem, experts=experts)


class TestTaskArithmeticOfAdapters(AdapterContract, DifferentiableContract):
    """The exact sum: a model in bfloat16 is rounded once, and the coefficients have gradients."""

    def make(self) -> Operator:
        return TaskArithmetic()

    def twin(self, base: Tensor, experts: Sequence[Any], values: Mapping[str, Tensor]) -> TwinResult:
        merged, magnitude = base.double(), base.double().abs()
        for coefficient, held in zip(values["coefficient"], experts, strict=True):
            weight = coefficient * held.scaling
            merged = merged + weight * (held.b.double() @ held.a.double())
            magnitude = magnitude + weight.abs() * (held.b.double().abs() @ held.a.double().abs())
        return decided(merged, magnitude)


class LoraTwin(AdapterContract):
    options: LoraOptions

    def make(self) -> Operator:
        return Lora(self.options)

    def draw_values(self, num_experts: int, num_tensors: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Coefficients of both signs."""
        coefficients = torch.rand((num_experts, num_tensors), generator=generator, dtype=torch.float64) * 1.6 - 0.4
        density = torch.rand((num_experts, num_tensors), generator=generator, dtype=torch.float64) * 0.6 + 0.3
        values = {"coefficient": coefficients, "density": density}
        return {spec.name: values[spec.name] for spec in self.make().parameters}

    def twin(self, base: Tensor, experts: Sequence[Any], values: Mapping[str, Tensor]) -> TwinResult:
        weights = [float(c) * held.scaling for c, held in zip(values["coefficient"], experts, strict=True)]
        roots = [abs(weight) ** 0.5 for weight in weights]
        signed = [root * (1 if weight >= 0 else -1) for root, weight in zip(roots, weights, strict=True)]
        densities = values["density"].tolist() if "density" in values and len(experts) > 1 else [1.0] * len(experts)
        b = self.side([held.b.double() for held in experts], roots, densities)
        a = self.side([held.a.double() for held in experts], signed, densities)
        terms = [
            torch.stack([root * factor.double().abs() for root, factor in zip(roots, side, strict=True)]).sum(0)
            for side in ([held.b for held in experts], [held.a for held in experts])
        ]
        return decided(base.double() + b @ a, base.double().abs() + terms[0] @ terms[1])

    def side(self, factors: list[Tensor], weights: Sequence[float], densities: Sequence[float]) -> Tensor:
        """One entry after the other, as PEFT's documentation tells it."""
        trimmed = []
        for factor, density in zip(factors, densities, strict=True):
            largest = sorted(range(factor.numel()), key=lambda i: -abs(float(factor.flatten()[i])))
            kept = set(largest[: int(density * factor.numel())])
            entries = [x if i in kept else 0.0 for i, x in enumerate(factor.flatten().tolist())]
            trimmed.append(entries)
        ties = self.options.combination == "ties" and len(factors) > 1
        merged = []
        for entries in zip(*trimmed, strict=True):
            terms = [weight * entry for weight, entry in zip(weights, entries, strict=True)]
            if ties:
                votes = entries if self.options.majority_sign == "total" else [(x > 0) - (x < 0) for x in entries]
                sign = 1 if sum(votes) >= 0 else -1
                terms = [term for term, entry in zip(terms, entries, strict=True) if entry * sign > 0]
            merged.append(sum(terms) / (max(len(terms), 1) if ties else 1))
        return torch.tensor(merged, dtype=torch.float64).view(factors[0].shape)


class TestLinear(LoraTwin):
    options = LoraOptions(combination="linear")


class TestMagnitudePrune(LoraTwin):
    options = LoraOptions(combination="magnitude_prune")


class TestTiesTotal(LoraTwin):
    options = LoraOptions(combination="ties")


class TestTiesFrequency(LoraTwin):
    options = LoraOptions(combination="ties", majority_sign="frequency")


class TestEvoMerging(LoraTwin):
    options = LoraOptions(combination="evo_merging")

    def twin(self, base: Tensor, experts: Sequence[Any], values: Mapping[str, Tensor]) -> TwinResult:
        """Dense, term by term: every adapter's B times every A, of which the largest entries are kept."""
        merged, magnitude = base.double(), base.double().abs()
        pairs = list(zip(values["coefficient"].tolist(), values["density"].tolist(), experts, strict=True))
        for b_coefficient, _, b_owner in pairs:
            for a_coefficient, density, a_owner in pairs:
                weight = b_coefficient * a_coefficient * (b_owner.scaling * a_owner.scaling) ** 0.5
                kept_a = self.side([a_owner.a.double()], [1.0], [density])
                merged = merged + weight * (b_owner.b.double() @ kept_a)
                magnitude = magnitude + abs(weight) * (b_owner.b.double().abs() @ a_owner.a.double().abs())
        return decided(merged, magnitude)

    def test_a_negative_coefficient_negates_what_an_adapter_does_with_others(self) -> None:
        """Its own product is squared: alone, minus one is one; and of two equal ones, one and minus one cancel."""
        problem = self.problem((12, 35), num_experts=1)
        ones = {"coefficient": torch.ones(1, 2).double(), "density": torch.ones(1, 2).double()}
        one, minus = (
            merge(self.make(), replace(problem, values=ones | {"coefficient": sign * ones["coefficient"]}))
            for sign in (1, -1)
        )
        twice = replace(
            problem,
            experts=problem.experts * 2,
            values={
                "coefficient": torch.tensor([[1.0], [-1.0]]).double().expand(2, 2),
                "density": torch.ones(2, 2).double(),
            },
        )
        for name, tensor in merge(self.make(), twice).items():
            assert torch.equal(one[name], minus[name])
            assert not torch.equal(one[name], problem.base[name])
            assert torch.equal(tensor, problem.base[name])

    def test_it_is_searched_as_it_was_published(self) -> None:
        coefficient, density = self.make().parameters
        assert (coefficient.low, coefficient.high, density.default) == (-1.5, 1.5, 1.0)
        assert coefficient.per_expert
        assert density.per_expert


class TestSvd(LoraTwin):
    options = LoraOptions(combination="svd", svd_rank=3)

    def twin(self, base: Tensor, experts: Sequence[Any], values: Mapping[str, Tensor]) -> TwinResult:
        """The whole sum is formed and truncated."""
        total = torch.zeros(base.shape, dtype=torch.float64)
        for coefficient, held in zip(values["coefficient"], experts, strict=True):
            total += float(coefficient) * held.scaling * (held.b.double() @ held.a.double())
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        rank = 3 if len(experts) > 1 else len(s)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        magnitude = (u[:, :rank].abs() * s[:rank]) @ v[:rank].abs()
        for coefficient, held in zip(values["coefficient"], experts, strict=True):
            magnitude += (coefficient * held.scaling).abs() * (held.b.double().abs() @ held.a.double().abs())
        return decided(base.double() + cut, base.double().abs() + magnitude)


REFERENCE = load_file(Path(__file__).parents[1] / "golden" / "peft_lora.safetensors")
MODULES = ("linear", "embedding", "conv1d")
SHAPES = {"linear": (12, 10), "embedding": (15, 8), "conv1d": (9, 6)}
SCALINGS = {"one": 2.0, "two": 0.75, "three": 1.5 / 3**0.5}
WEIGHTS = (0.7, -0.4, 1.2)


def of_reference() -> Sources:
    """The adapters that PEFT combined, on a base of zeros; embeddings and Conv1D keep their matrices transposed."""
    layout = Layout.of(tuple(TensorInfo(name, SHAPES[name]) for name in MODULES))
    experts = []
    for expert, scaling in SCALINGS.items():
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        for s, module in enumerate(MODULES):
            if f"{expert}.{module}.A" in REFERENCE:
                a, b = REFERENCE[f"{expert}.{module}.A"], scaling * REFERENCE[f"{expert}.{module}.B"]
                factors[s] = (b, a) if module == "linear" else (a.T.contiguous(), b.T.contiguous())
        experts.append(LowRank(factors, dict.fromkeys(factors, scaling), frozenset({1, 2})))
    return Sources(layout, torch.zeros(layout.num_padded), tuple(experts))


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("cat", TaskArithmetic()),
        ("svd", Lora()),
        ("svd_rank_5", Lora(LoraOptions(svd_rank=5))),
        ("linear", Lora(LoraOptions(combination="linear"))),
        ("ties_total", Lora(LoraOptions(combination="ties"))),
        ("ties_frequency", Lora(LoraOptions(combination="ties", majority_sign="frequency"))),
        ("magnitude_prune", Lora(LoraOptions(combination="magnitude_prune"))),
    ],
)
def test_what_peft_computed(name: str, operator: Operator) -> None:
    """PEFT and we round in float32 some twenty times; entries are of order 1. Another mask would move them by 0.01."""
    sources = of_reference()
    values = {"coefficient": torch.tensor(WEIGHTS, dtype=torch.float64)[:, None].expand(3, 3)}
    if any(spec.name == "density" for spec in operator.parameters):
        values["density"] = torch.full((3, 3), 0.5, dtype=torch.float64)
    state = operator.prepare(sources, values, None)
    out_P = torch.full_like(sources.base_P, float("nan"))
    operator.merge(out_P, sources, operator.weights(values, state), state)
    merged = sources.layout.views(out_P)
    for module in MODULES:
        torch.testing.assert_close(merged[module], REFERENCE[f"{name}.{module}"], rtol=0, atol=1e-6)
        assert float(REFERENCE[f"{name}.{module}"].abs().max()) > 0.1


class TestDare:
    def problem(self, num_experts: int = 2) -> Problem:
        """Factors of ones: what is kept can be seen in the state."""
        base = {"big": torch.zeros(400, 300)}
        ones = Factors(torch.ones(400, 16), torch.ones(16, 300), 1.0)
        return Problem(base, [{"big": ones}] * num_experts, {"coefficient": torch.ones(num_experts, 1).double()})

    def kept(self, density: float, **options: Any) -> list[Tensor]:
        problem = self.problem()
        values = {**problem.values, "density": torch.full((2, 1), density, dtype=torch.float64)}
        [adapters] = Lora(LoraOptions(combination="dare_linear", **options)).prepare(lay_out(problem), values, None)
        return [*adapters.b, *adapters.a]

    def test_it_keeps_the_asked_share_and_rescales(self) -> None:
        for factor in self.kept(0.3):
            share = float((factor != 0).double().mean())
            assert abs(share - 0.3) < 4 * (0.3 * 0.7 / factor.numel()) ** 0.5  # four standard errors
            assert set(factor.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}

    def test_experts_and_factors_draw_apart(self) -> None:
        """Of two independent draws both keep an entry with the product of the densities."""
        b_one, b_two, a_one, _ = (factor != 0 for factor in self.kept(0.3))
        assert abs(float((b_one & b_two).double().mean()) - 0.09) < 4 * (0.09 * 0.91 / b_one.numel()) ** 0.5
        flat_b, flat_a = b_one.flatten()[: a_one.numel()], a_one.flatten()
        assert abs(float((flat_b & flat_a).double().mean()) - 0.09) < 4 * (0.09 * 0.91 / flat_a.numel()) ** 0.5

    def test_what_a_density_keeps_a_larger_one_keeps_too(self) -> None:
        for fewer, more in zip(self.kept(0.3), self.kept(0.4), strict=True):
            assert not ((fewer != 0) & (more == 0)).any()

    def test_another_seed_draws_anew_and_the_same_seed_does_not(self) -> None:
        assert all(map(torch.equal, self.kept(0.3), self.kept(0.3, seed=0)))
        assert not any(map(torch.equal, self.kept(0.3), self.kept(0.3, seed=1)))

    @pytest.mark.parametrize(("dare", "plain"), [("dare_linear", "linear"), ("dare_ties", "ties")])
    def test_a_density_of_one_draws_nothing(self, dare: Any, plain: Any) -> None:
        problem = TestLinear().problem((600, 35), num_experts=3, seed=4)
        values = {**problem.values, "density": torch.ones(3, 2, dtype=torch.float64)}
        drawn, undrawn = (
            merge(Lora(LoraOptions(combination=combination)), replace(problem, values=values))
            for combination in (dare, plain)
        )
        assert all(torch.equal(drawn[name], undrawn[name]) for name in drawn)

    def test_a_density_of_zero_is_a_failed_candidate(self) -> None:
        with pytest.raises(CandidateError, match="density of 0"):
            self.kept(0.0)


class TestOneAdapter:
    """One adapter is taken as it is, whatever the combination; PEFT does so, too."""

    @pytest.mark.parametrize("combination", ["svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
    def test_its_coefficient_is_that_of_task_arithmetic(self, combination: Any) -> None:
        problem = TestLinear().problem((600, 35), num_experts=1)
        values = {**problem.values, "density": torch.full((1, 2), 0.2, dtype=torch.float64)}
        ours = merge(Lora(LoraOptions(combination=combination, svd_rank=1)), replace(problem, values=values))
        plain = merge(TaskArithmetic(), problem)
        for name, tensor in plain.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
            assert not torch.equal(tensor, problem.base[name])


class TestRefusals:
    def prepare(self, experts: Sequence[Mapping[str, Any]], combination: Any = "linear") -> None:
        base = {"t": torch.zeros(6, 5)}
        values = {"coefficient": torch.ones(len(experts), 1, dtype=torch.float64)}
        Lora(LoraOptions(combination=combination)).prepare(lay_out(Problem(base, experts, values)), values, None)

    def factors(self, rank: int) -> Factors:
        return Factors(torch.ones(6, rank), torch.ones(rank, 5), 1.0)

    def test_a_full_checkpoint(self) -> None:
        with pytest.raises(CampaignError, match="expert 2 of 2 is a full checkpoint.*task_arithmetic"):
            self.prepare([{"t": self.factors(2)}, {"t": torch.zeros(6, 5)}])

    def test_other_ranks_where_factors_are_summed(self) -> None:
        with pytest.raises(CampaignError, match="t: linear needs adapters of one rank, found 2 and 3"):
            self.prepare([{"t": self.factors(2)}, {"t": self.factors(3)}])
        self.prepare([{"t": self.factors(2)}, {"t": self.factors(3)}], combination="svd")

    def test_a_tensor_that_was_saved_whole(self) -> None:
        sources = of_reference()
        first = sources.experts[0]
        assert isinstance(first, LowRank)
        whole = LowRank({**first.factors, 0: (torch.ones(120, 1), torch.ones(1, 1))}, {1: 2.0, 2: 2.0})
        with pytest.raises(CampaignError, match="expert 1 of 3 saves linear whole.*task_arithmetic"):
            Lora().prepare(replace(sources, experts=(whole, *sources.experts[1:])), {}, None)


def test_density_is_a_parameter_of_the_combinations_that_prune() -> None:
    names = {
        combination: [spec.name for spec in Lora(LoraOptions(combination=combination)).parameters]
        for combination in ("svd", "linear", "ties", "dare_ties")
    }
    assert names["svd"] == names["linear"] == ["coefficient"]
    assert names["ties"] == names["dare_ties"] == ["coefficient", "density"]
