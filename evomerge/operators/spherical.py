"""The spherical family: merges along arcs instead of straight lines.

Each is linear in effective weights, and these depend on the experts only through their lengths and the angles between
them. One pass over the sources, kept as a small matrix a tensor, serves every candidate; gradients come as for linear
merging. A tensor, flattened, is one vector. Conventions are mergekit's where it has the method; departures are noted.

Shape letters: K experts, S tensors, V vectors side by side (tensors, or the rows or columns of one tensor).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomerge.errors import CampaignError
from evomerge.kernels.sources import Sources
from evomerge.operators.linear import Lincomb, normalized
from evomerge.operators.operator import Values
from evomerge.operators.vectors import (
    TINY,
    Vectors,
    angles,
    inner_products,
    lengths_and_cosines,
    lincomb_vectors,
    of_experts,
    vectors_of,
)
from evomerge.records import Options, ParameterSpec

CANCELLED = 1e-6
"""Length of a mean of unit vectors below which they cancel: where it points is a matter of rounding."""


class Slerp(Lincomb):
    """Spherical interpolation from the base (t = 0) to the one expert (t = 1); the coefficient is t.

        theta = (sin((1 - t) a) base + sin(t a) expert) / sin(a)
        a = angle(base, expert)

    Angles are between the tensors as they are; it is a straight line where |cos a| > 0.9995, and most fine-tuned
    tensors are that close to their base: slerp is lerp for them.
    When to use: one expert that went far from the base, as by continued pretraining. Of an ordinary fine-tune
    ``task_arithmetic`` with that one expert makes the same model; for two experts there is ``nuslerp``.
    Reference: Shoemake 1985, doi.org/10.1145/325165.325242; mergekit's ``slerp``.
    """

    name: ClassVar[str] = "slerp"

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(name="coefficient", meaning="way from base to expert", default=0.5, low=0.0, high=1.0),
        )

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> Tensor:  # noqa: ARG002
        """Return the cosines of base and expert (S,)."""
        if sources.num_experts != 1:
            raise CampaignError(
                f"slerp: expected one expert (the base is the other end), found {sources.num_experts}; "
                "nuslerp merges two, multislerp and karcher any number"
            )
        products = torch.cat([inner_products(sources, s, "tensor") for s in range(sources.num_tensors)])
        return lengths_and_cosines(of_experts(products))[1][:, 0, 1]

    def weights(self, values: Values, state: Tensor) -> Tensor:
        """The expert is base + task vector, so the base counts as often as both."""
        base_S, expert_S = arc(values["coefficient"][0], state, straight=0.9995)
        return torch.stack([base_S + expert_S, expert_S])


class NuSlerpOptions(Options):
    """relative: interpolate the task vectors (false: the experts as they are, without the base).

    vectors: what the angle is between: whole tensors, or each row (output) or each column (input) of a matrix by
    itself; vectors such as biases are whole. ("rows" is mergekit's nuslerp_flatten: false, "columns" its
    nuslerp_row_wise, whose documentation has the two the other way round.)
    """

    relative: bool = True
    vectors: Vectors = "tensor"


class NuSlerp(Lincomb):
    """Spherical interpolation between two experts, on the arc between their task vectors.

        theta = base + (sin((1 - t) a) tau_1 + sin(t a) tau_2) / sin(a)
        t = c_2 / (c_1 + c_2), a = angle(tau_1, tau_2)

    A straight line only where the two are parallel or opposite to within rounding. Weights that sum to zero are a
    failed candidate here; mergekit takes t = 0.5.
    When to use: two experts of different skills. Their task vectors are nearly perpendicular, so that their plain mean
    is too short by a factor of 1.4, and the arc's middle is not. One number decides; for more freedom or more experts
    take ``task_arithmetic``. ``vectors: rows`` or ``columns`` have no gradients.
    Reference: Shoemake 1985, doi.org/10.1145/325165.325242; mergekit's ``nuslerp``.
    """

    name: ClassVar[str] = "nuslerp"

    options_type: ClassVar[type[Options]] = NuSlerpOptions

    def __init__(self, options: NuSlerpOptions | None = None) -> None:
        self.options = options or NuSlerpOptions()
        self.differentiable = self.options.vectors == "tensor"  # otherwise a tensor has many weights
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(name="coefficient", meaning="weight of an expert", default=1.0, low=0.0, high=1.0),
        )

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> list[Tensor]:  # noqa: ARG002
        """Return each tensor's cosines of the two experts, (V,)."""
        if sources.num_experts != 2:
            raise CampaignError(
                f"nuslerp: expected two experts, found {sources.num_experts}; slerp merges one with the base, "
                "multislerp and karcher any number"
            )
        options = self.options
        cosines = (angles(sources, s, options.vectors, options.relative)[1] for s in range(sources.num_tensors))
        return [cosines_V22[:, 0, 1] for cosines_V22 in cosines]

    def weights(self, values: Values, state: list[Tensor]) -> Tensor:
        """Of whole tensors, what ``lincomb`` takes; of rows or columns, the two shares, as the rest differs by line."""
        shares_2S = normalized(self.name, values["coefficient"])
        if self.options.vectors == "tensor":
            return self._weights(shares_2S[1], torch.cat(state))
        return torch.cat([torch.ones_like(shares_2S[:1]), shares_2S])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: list[Tensor],
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``lincomb``, or weigh each row or column."""
        if self.options.vectors == "tensor":
            super().merge(out_P, sources, weights_KS, state, changed)
            return
        for s in range(sources.num_tensors) if changed is None else changed:
            weights_KV = self._weights(weights_KS[2, s], state[s])
            lincomb_vectors(out_P, sources, s, weights_KV, vectors_of(sources, s, self.options.vectors))

    def _weights(self, t: Tensor, cosine_V: Tensor) -> Tensor:
        # Closer to parallel than an angle of 1e-6, arc and line agree to 1e-12; closer to opposite, the arc could go
        # any way round, and its weights of 10^6 and more would leave nothing but rounding errors.
        first_V, second_V = arc(t, cosine_V, straight=1 - 5e-13)
        base_V = torch.ones_like(first_V) if self.options.relative else first_V + second_V
        return torch.stack([base_V, first_V, second_V])


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """The experts' lengths (S, K) and cosines (S, K, K), float64."""

    lengths_SK: Tensor
    cosines_SKK: Tensor


class MultiSlerpOptions(Options):
    """relative: average the task vectors (false: the experts as they are, without the base)."""

    relative: bool = True


class MultiSlerp(Lincomb):
    """The mean direction of the experts' task vectors, as long as these are on average.

        theta = base + (sum_k w_k |tau_k|) m / |m|
        m = sum_k w_k tau_k / |tau_k|, w_k = c_k / sum_j c_j

    mergekit projects to the tangent space at m and back, which changes nothing: the projections sum to zero. Where the
    directions cancel (|m| = 0) the merge is the straight mean; mergekit refuses it for more than two experts.
    When to use: three experts and more whose shares matter, and not how far the merge goes: its length is theirs. Not
    where skills should add up beyond that; the length is no number of its own.
    Reference: mergekit's ``multislerp``; there is no paper.
    """

    name: ClassVar[str] = "multislerp"

    options_type: ClassVar[type[Options]] = MultiSlerpOptions

    def __init__(self, options: MultiSlerpOptions | None = None) -> None:
        self.options = options or MultiSlerpOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="coefficient", meaning="weight of an expert", default=1.0, low=0.0, high=1.0, minimum=0.0
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: Any | None) -> Angles:  # noqa: ARG002
        """Return lengths and angles of the experts or their task vectors."""
        found = [angles(sources, s, "tensor", self.options.relative) for s in range(sources.num_tensors)]
        return Angles(torch.cat([lengths for lengths, _ in found]), torch.cat([cosines for _, cosines in found]))

    def weights(self, values: Values, state: Angles) -> Tensor:
        """The weights of unit vectors in the mean direction, times mean length over length: those of the vectors."""
        shares_SK = normalized(self.name, values["coefficient"]).T
        has_direction_SK = state.lengths_SK > TINY
        sum_SK = shares_SK * has_direction_SK
        squares_S1 = _dot(sum_SK, sum_SK, state.cosines_SKK)
        cancel_S1 = squares_S1 < CANCELLED**2
        mean_SK = self._mean_direction(
            sum_SK / torch.where(cancel_S1, 1.0, squares_S1).sqrt(), sum_SK, state.cosines_SKK
        )
        length_S1 = (shares_SK * state.lengths_SK).sum(1, keepdim=True)
        along_SK = mean_SK * (length_S1 / torch.where(has_direction_SK, state.lengths_SK, 1.0))
        weights_KS = torch.where(cancel_S1, sum_SK, along_SK).T
        base_1S = torch.ones_like(weights_KS[:1]) if self.options.relative else weights_KS.sum(0, keepdim=True)
        return torch.cat([base_1S, weights_KS])

    def _mean_direction(self, start_SK: Tensor, shares_SK: Tensor, cosines_SKK: Tensor) -> Tensor:  # noqa: ARG002
        """Return the weights of the unit vectors in the mean direction; ``start_SK`` are those of their scaled sum."""
        return start_SK


class KarcherOptions(MultiSlerpOptions):
    """relative: average the task vectors (false: the experts as they are, without the base)."""

    relative: bool = False


class Karcher(MultiSlerp):
    """The experts' mean on the sphere, the direction that is nearest to all of theirs, times their mean length.

        theta = (sum_k w_k |expert_k|) u
        u = argmin over unit vectors of sum_k w_k angle(u, expert_k)^2
        w_k = c_k / sum_j c_j

    Reached from the scaled sum of the unit vectors by at most 10 gradient steps, fewer if one is shorter than 1e-5; an
    expert nearer than 1e-5 to the present mean, or to its opposite, does not pull. mergekit has equal weights only.
    When to use: experts that lie far apart. Whole fine-tuned models are so nearly parallel that this is ``linear`` for
    them: ``relative: true`` takes their task vectors, whose angles are wide, and adds their mean to the base.
    Reference: Buss and Fillmore 2001, doi.org/10.1145/502122.502124; mergekit's ``karcher``.
    """

    name: ClassVar[str] = "karcher"

    options_type: ClassVar[type[Options]] = KarcherOptions

    def __init__(self, options: KarcherOptions | None = None) -> None:
        super().__init__(options or KarcherOptions())

    def _mean_direction(self, start_SK: Tensor, shares_SK: Tensor, cosines_SKK: Tensor) -> Tensor:
        """All in weights of the unit vectors, whose inner products are the cosines."""
        shares_SK = shares_SK / shares_SK.sum(1, keepdim=True).clamp(min=TINY)
        mean_SK = start_SK
        for _ in range(10):
            cosine_SK = _times(cosines_SKK, mean_SK)
            pulls_SK = cosine_SK.abs() < 1 - 5e-11  # cos(1e-5)
            safe_SK = torch.where(pulls_SK, cosine_SK, 0.0)
            pull_SK = torch.where(pulls_SK, shares_SK * safe_SK.acos() / (1 - safe_SK**2).sqrt(), 0.0)
            step_SK = pull_SK - (pull_SK * cosine_SK).sum(1, keepdim=True) * mean_SK  # tangent at the mean
            squares_S1 = _dot(step_SK, step_SK, cosines_SKK)
            moves_S1 = squares_S1 >= 1e-10
            if not bool(moves_S1.any()):
                break
            angle_S1 = torch.where(moves_S1, squares_S1, 1.0).sqrt()
            moved_SK = angle_S1.cos() * mean_SK + angle_S1.sin() / angle_S1 * step_SK
            mean_SK = torch.where(moves_S1, moved_SK, mean_SK)
        return mean_SK


def arc(t_V: Tensor, cosine_V: Tensor, straight: float) -> tuple[Tensor, Tensor]:
    """Return the ends' weights sin((1 - t) a) / sin a and sin(t a) / sin a, or 1 - t and t where |cosine| > straight.

    They are smooth in the cosine, so the digits that acos loses near 1 come back. At t = 0 and 1 they are exact.
    """
    is_straight_V = cosine_V.abs() > straight
    angle_V = torch.where(is_straight_V, 0.0, cosine_V).acos()
    first_V, second_V = ((part * angle_V).sin() / angle_V.sin() for part in (1 - t_V, t_V))
    return torch.where(is_straight_V, 1 - t_V, first_V), torch.where(is_straight_V, t_V, second_V)


def _times(matrix_SKK: Tensor, vector_SK: Tensor) -> Tensor:
    return (matrix_SKK @ vector_SK[..., None])[..., 0]


def _dot(one_SK: Tensor, other_SK: Tensor, cosines_SKK: Tensor) -> Tensor:
    """Return the inner products (S, 1) of two sums of unit vectors."""
    return (one_SK * _times(cosines_SKK, other_SK)).sum(1, keepdim=True)
