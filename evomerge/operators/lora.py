"""LoRA adapters combined factor by factor, as PEFT or Evo-Merging combines them.

PEFT's ``*_svd`` merge whole matrices and truncate; without the truncation that is ``ties`` and its kin, which take
adapters as task vectors.

Shape letters: K experts, S tensors, R summed rank of all adapters, r rank, O and I rows and columns of a matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.errors import CampaignError, CandidateError
from evomerge.kernels.lincomb import lincomb
from evomerge.kernels.masked import name_hash
from evomerge.kernels.sources import LowRank, Sources
from evomerge.kernels.tiles import hash32
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec

Combination = Literal["svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "evo_merging"]


class LoraOptions(Options):
    """combination: PEFT's ``combination_type``, or evo_merging.

    svd_rank: of the result (default: the adapters' largest). majority_sign: elect by the sum of the entries, or by the
    count of their signs. seed: of DARE's draws.
    """

    combination: Combination = "svd"
    svd_rank: int | None = Field(default=None, ge=1)
    majority_sign: Literal["total", "frequency"] = "total"
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """The adapters of one matrix: those of the ``experts`` that have one.

    b (O, r) and a (r, I) each, pruned, without the scaling. basis, for svd: of all B's side by side and of all A's
    stacked, the QR factors (O, m), (m, R), (I, n), (n, R), float64.
    """

    experts: list[int]
    b: list[Tensor]
    a: list[Tensor]
    scalings: list[float]
    transposed: bool
    basis: tuple[Tensor, ...] = ()


class Lora:
    """Combinations of LoRA adapters, factor by factor or as a truncated sum; every expert must be an adapter.

        svd:          theta = base + sum_k c_k s_k B_k A_k, truncated to svd_rank
        factors:      theta = base + B A
        linear, ...:  B = merge_k(|c_k s_k|^(1/2) B_k), A the same, with the sign of c_k
        evo_merging:  B = sum_k c_k s_k^(1/2) B_k, A = sum_k c_k s_k^(1/2) top(A_k)

    s_k is an adapter's scaling; merge_k sums, or trims, votes or draws as ``ties_paper`` and ``dare_linear`` do, by a
    ``density``, which the table below lacks (one an adapter; ``svd`` and ``linear`` have none); top keeps the largest
    of A. The exact sum, PEFT's ``cat``, is ``task_arithmetic``. PEFT's combinations of factors also hold every
    adapter's B times every other's A: small adapters, and a rough approximation of the sum. evo_merging weighs either
    factor, so that an adapter's own product has the square of its coefficient, and a negative one negates only its
    products with the others. Without pruning that is LoraHub's merge (arxiv.org/abs/2307.13269).
    When to use: where the result must be one small adapter (``svd``), or for a pool of adapters and one task
    (``evo_merging``, with ``cma_es`` or ``lorahub``). Otherwise ``task_arithmetic`` is exact, faster and has gradients,
    which none of these has. Measured with seven adapters and 180 evaluations, pruning made no difference that could be
    told, and a range that holds negative coefficients did harm.
    Reference: PEFT 0.21.2, ``LoraModel.add_weighted_adapter``, whose TIES elects the sign before weighting and divides
    by the count; Evo-Merging, 2025, arxiv.org/abs/2509.12951.
    Departures: everything is computed in float32 whatever the adapters' dtype; DARE's draws are a hash of (seed,
    expert, tensor, factor, place), equal for all candidates; and adapters' scalings may differ.
    """

    name: ClassVar[str] = "lora"
    reads_factors: ClassVar[bool] = True
    differentiable: bool = False  # products of roots of the coefficients, or singular vectors
    local: bool = True

    options_type: ClassVar[type[Options]] = LoraOptions

    def __init__(self, options: LoraOptions | None = None) -> None:
        self.options = options or LoraOptions()
        self._is_evo = self.options.combination == "evo_merging"
        coefficient = ParameterSpec(
            name="coefficient",
            meaning="weight of an adapter",
            default=1.0,
            low=-1.5 if self._is_evo else 0.0,
            high=1.5,
        )
        density = ParameterSpec(
            name="density",
            meaning="fraction of an adapter's entries that is kept, of each factor or of A alone",
            default=1.0 if self._is_evo else 0.2,
            low=0.1,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
            structural=True,
        )
        self._prunes = self.options.combination not in ("svd", "linear")
        self.parameters: tuple[ParameterSpec, ...] = (coefficient, density) if self._prunes else (coefficient,)

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> list[Adapters]:  # noqa: ARG002
        """Return the adapters of every tensor, pruned.

        Raises: CampaignError if an expert is no adapter, or ranks differ; CandidateError for a density of 0 in DARE.
        """
        experts = _low_rank(sources)
        found = [self._adapters(experts, s, tensor.name) for s, tensor in enumerate(sources.layout.tensors)]
        # PEFT, too, takes one adapter as it is, whatever the combination.
        if sources.num_experts == 1 and not self._is_evo:
            return found
        if self.options.combination == "svd":
            return [self._with_basis(adapters) for adapters in found]
        if not self._prunes:
            return found
        densities_SK = values["density"].T.tolist()
        names = [tensor.name for tensor in sources.layout.tensors]
        return list(map(self._pruned, found, names, densities_SK))

    def weights(self, values: Values, state: list[Adapters]) -> Tensor:  # noqa: ARG002
        """The coefficients are the weights; the base counts once."""
        coefficients_KS = values["coefficient"]
        return torch.cat([torch.ones_like(coefficients_KS[:1]), coefficients_KS])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: list[Adapters],
        changed: Sequence[int] | None = None,
    ) -> None:
        """Combine each matrix's factors and launch ``lincomb`` with the one adapter that comes out."""
        combined = replace(sources, experts=(self.combined(weights_KS, state, changed),))
        lincomb(out_P, combined, torch.ones(2, len(state), dtype=torch.float64), changed)

    def combined(self, weights_KS: Tensor, state: list[Adapters], changed: Sequence[int] | None = None) -> LowRank:
        """Return the one adapter that the merge adds to the base, or the factors of the ``changed`` tensors of it."""
        largest = max((len(a) for adapters in state for a in adapters.a), default=0)
        factors = {}
        for s in range(len(state)) if changed is None else changed:
            if state[s].experts:
                b, a = self._combine(state[s], weights_KS[1:, s], self.options.svd_rank or largest)
                factors[s] = (a.T.contiguous(), b.T.contiguous()) if state[s].transposed else (b, a)
        return LowRank(factors, transposed=frozenset(s for s in factors if state[s].transposed))

    def _adapters(self, experts: Sequence[LowRank], s: int, name: str) -> Adapters:
        found = Adapters([], [], [], [], transposed=any(s in expert.transposed for expert in experts))
        for k, expert in enumerate(experts):
            if s not in expert.factors:
                continue
            if s not in expert.scalings:
                raise CampaignError(
                    f"lora: expert {k + 1} of {len(experts)} saves {name} whole (modules_to_save or bias); "
                    "PEFT combines factors only: use task_arithmetic"
                )
            b, a = expert.factors[s]
            if found.transposed:
                b, a = a.T.contiguous(), b.T.contiguous()
            found.experts.append(k)
            found.b.append(b / expert.scalings[s])
            found.a.append(a)
            found.scalings.append(expert.scalings[s])
        ranks = sorted({len(a) for a in found.a})
        if len(ranks) > 1 and self.options.combination != "svd":
            raise CampaignError(
                f"lora: {name}: {self.options.combination} needs adapters of one rank, found "
                f"{' and '.join(map(str, ranks))}; svd and task_arithmetic take any"
            )
        return found

    def _with_basis(self, adapters: Adapters) -> Adapters:
        if not adapters.experts:
            return adapters
        # In float64, so that what is cut off depends on the singular values and not on how they were found.
        b_basis, b_core = torch.linalg.qr(torch.cat(adapters.b, dim=1).double())
        a_basis, a_core = torch.linalg.qr(torch.cat(adapters.a).double().T)
        return replace(adapters, basis=(b_basis, b_core, a_basis, a_core))

    def _pruned(self, adapters: Adapters, name: str, densities_K: Sequence[float]) -> Adapters:
        def pruned(side: Sequence[Tensor], part: str) -> list[Tensor]:
            owned = zip(side, adapters.experts, strict=True)
            return [self._kept(factor, densities_K[k], k, f"{name} {part}") for factor, k in owned]

        b = adapters.b if self._is_evo else pruned(adapters.b, "B")
        return replace(adapters, b=b, a=pruned(adapters.a, "A"))

    def _kept(self, factor: Tensor, density: float, expert: int, name: str) -> Tensor:
        """Return a factor with so many of its entries: the largest, or drawn ones that are rescaled."""
        if density >= 1:
            return factor
        if not self.options.combination.startswith("dare"):
            return _keep_largest(factor, density)
        if density == 0:
            raise CandidateError("lora: a density of 0 leaves nothing to rescale")
        return torch.where(_draws(factor, self.options.seed, expert, name) < density, factor / density, 0.0)

    def _combine(self, adapters: Adapters, coefficients_K: Tensor, svd_rank: int) -> tuple[Tensor, Tensor]:
        """Return one B (O, r) and one A (r, I)."""
        coefficients = [float(coefficients_K[k]) for k in adapters.experts]
        products = [c * scaling for c, scaling in zip(coefficients, adapters.scalings, strict=True)]
        if adapters.basis:
            return _truncated(adapters, products, svd_rank)
        if self._is_evo:
            halves = [
                (c * of_b, c * of_a)
                for c, (of_b, of_a) in zip(coefficients, map(_halves, adapters.scalings), strict=True)
            ]
        else:
            halves = list(map(_halves, products))
        return self._sum(adapters.b, [of_b for of_b, _ in halves]), self._sum(adapters.a, [of_a for _, of_a in halves])

    def _sum(self, factors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stacked = torch.stack(list(factors))
        weighted = stacked * torch.tensor(weights, device=stacked.device)[:, None, None]
        if len(factors) == 1 or not self.options.combination.endswith("ties"):
            return weighted.sum(0)
        signs = stacked.sign()
        votes = (stacked if self.options.majority_sign == "total" else signs).sum(0)
        agrees = signs == torch.where(votes >= 0, 1.0, -1.0)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _halves(product: float) -> tuple[float, float]:
    """Split a weight of B A between B and A; the sign goes to A alone: on both sides it would cancel."""
    root = math.sqrt(abs(product))
    return root, math.copysign(root, product)


def _low_rank(sources: Sources) -> list[LowRank]:
    """Return the experts, all of them adapters."""
    found = []
    for k, expert in enumerate(sources.experts):
        if not isinstance(expert, LowRank):
            raise CampaignError(
                f"lora: expert {k + 1} of {sources.num_experts} is a full checkpoint; expected adapters only: "
                "task_arithmetic merges both kinds"
            )
        found.append(expert)
    return found


def _keep_largest(factor: Tensor, density: float) -> Tensor:
    """Keep int(density * elements) entries by magnitude; none, if that is 0."""
    kept = factor.abs().flatten().topk(int(density * factor.numel())).indices
    pruned = torch.zeros_like(factor)
    pruned.view(-1)[kept] = factor.flatten()[kept]
    return pruned


def _draws(factor: Tensor, seed: int, expert: int, name: str) -> Tensor:
    """Return a number of [0, 1) for every entry, a hash of its place."""
    key = hash32(hash32(torch.tensor([name_hash(name)], dtype=torch.int32) + seed) + expert)
    places = torch.arange(factor.numel(), dtype=torch.int32, device=factor.device)
    bits = hash32(hash32(places) ^ key.to(factor.device))
    return (((bits >> 8) + 2**23).float() * 2.0**-24).view(factor.shape)


def _truncated(adapters: Adapters, products: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """Return the exact sum of the adapters' products, truncated to its largest singular values."""
    b_basis, b_core, a_basis, a_core = adapters.basis
    column_R = [product for product, a in zip(products, adapters.a, strict=True) for _ in range(len(a))]
    core = (b_core * torch.tensor(column_R, dtype=torch.float64, device=b_core.device)) @ a_core.T
    u, singular, v = torch.linalg.svd(core, full_matrices=False)
    b = b_basis @ (u[:, :rank] * singular[:rank])
    return b.float(), (v[:rank] @ a_basis.T).float()
