"""The guard: whether an expert looks like a fine-tuned checkpoint of this base, or like one that must not be merged.

Two networks can compute the same function with weights that have nothing to do with each other: hidden units permuted,
or query and key (value and output) multiplied by a matrix and its inverse, as MergeLock (arxiv.org/abs/2509.01548) does
on purpose. Merging such an expert destroys it and the others. What gives it away: its weights lie far from the base,
while what the function depends on (products of query and key, of output and value, rows but not their order) is the
base's.

Shape letters: K experts, S tensors, N kinds of module, d a head's width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.kernels.sources import Sources
from evomerge.operators.vectors import inner_products
from evomerge.records import Floats
from evomerge.space.groups import module_kind

FAR = 0.5
"""Relative norm of a task vector from which weights count as far away; fine-tuning moves them by a few hundredths."""
NEAR = 0.25
"""Relative to how far the weights moved: below, an invariant of the function counts as kept."""
SAMPLE = 64
"""Rows that are looked for in the base."""

_PROJECTION = re.compile(
    r"(?P<block>.*?)(?:attn|attention|self_attention)?\.(?:self\.|attention\.)?"
    r"(?P<role>q_proj|k_proj|v_proj|o_proj|query|key|value|out_proj|output\.dense)\.weight$"
)
_ROLE = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out_proj": "o_proj", "output.dense": "o_proj"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A sign that an expert cannot be merged: what was seen, and what to do."""

    expert: str
    sign: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardReport:
    """Per expert and kind of module |task vector| / |base| (K, N), the task vectors' cosines (K, K), and suspicions.

    A kind whose base is all zeros has the relative norm infinity where an expert moved it. The cosine with a task
    vector of zero is zero.
    """

    experts: tuple[str, ...]
    kinds: tuple[str, ...]
    norms_KN: Floats
    cosines_KK: Floats
    suspicions: tuple[Suspicion, ...]


def inspect_experts(sources: Sources, experts: Sequence[str], config: Mapping[str, Any]) -> GuardReport:
    """Read every task vector once and report; ``config`` is the base's config.json (for the number of heads)."""
    names = [tensor.name for tensor in sources.layout.tensors]
    kinds = list(dict.fromkeys(map(module_kind, names)))
    squares_KN = np.zeros((sources.num_experts, len(kinds)))
    base_N = np.zeros(len(kinds))
    gram_KK = np.zeros((sources.num_experts, sources.num_experts))
    relative_KS = np.zeros((sources.num_experts, len(names)))
    for s, name in enumerate(names):
        products = inner_products(sources, s, "tensor")[0].numpy()
        square, gram = products[0, 0], products[1:, 1:]
        n = kinds.index(module_kind(name))
        gram_KK += gram
        squares_KN[:, n] += gram.diagonal()
        base_N[n] += square
        relative_KS[:, s] = np.sqrt(_over(gram.diagonal(), square))
    norms_K = np.sqrt(gram_KK.diagonal())
    cosines_KK = _over(gram_KK, np.outer(norms_K, norms_K), empty=0.0)
    heads = _num_heads(config)
    suspicions = [
        Suspicion(expert=expert, sign=sign, advice=advice)
        for k, expert in enumerate(experts)
        for sign, advice in _signs(sources, k, relative_KS[k], heads)
    ]
    suspicions += _alike(experts, cosines_KK, norms_K)
    return GuardReport(
        experts=tuple(experts),
        kinds=tuple(kinds),
        norms_KN=np.sqrt(_over(squares_KN, base_N)),
        cosines_KK=cosines_KK,
        suspicions=tuple(suspicions),
    )


def _signs(sources: Sources, k: int, relative_S: Floats, num_heads: int | None) -> list[tuple[str, str]]:
    """Return (sign, advice) of one expert."""
    matrices = [s for s, tensor in enumerate(sources.layout.tensors) if len(tensor.shape) == 2]
    if not relative_S.any():
        return [("its tensors are the base's", "leave it out: it adds nothing")]
    far = [s for s in matrices if relative_S[s] > FAR]
    if not far:
        return []
    signs = []
    transformed = _transformed_attention(sources, k, relative_S, num_heads) if num_heads else set()
    permuted = {s for s in far if s not in transformed and _is_permuted(sources, k, s)}
    if transformed:
        signs.append(
            (
                f"{len(transformed)} attention projections lie far from the base (up to "
                f"{max(relative_S[s] for s in transformed):.1f} of its norm) while query-key or output-value products "
                "are the base's: transformed as MergeLock does, which declines merging",
                "leave it out, or ask its owner for the checkpoint before the transformation",
            )
        )
    if permuted:
        signs.append(
            (
                f"{len(permuted)} matrices lie far from the base but have the same rows or columns in another order: "
                "its hidden units are permuted",
                "align it to the base first (weight matching), or leave it out",
            )
        )
    rest = [s for s in far if s not in transformed | permuted]
    if len(rest) > len(matrices) / 2:
        signs.append(
            (
                f"{len(rest)} of {len(matrices)} matrices differ from the base by more than {FAR:g} of its norm: "
                "it was trained from another base",
                "name the base it was fine-tuned from, or leave it out",
            )
        )
    elif rest and not transformed and not permuted:
        signs.append(
            (
                f"{sources.layout.tensors[rest[0]].name}{' and others' if len(rest) > 1 else ''} moved by "
                f"{relative_S[rest[0]]:.1f} of the base's norm",
                "expect a small best coefficient there; search per module or tensor",
            )
        )
    return signs


def _alike(experts: Sequence[str], cosines_KK: Floats, norms_K: Floats) -> list[Suspicion]:
    """Name pairs of experts that are the same."""
    return [
        Suspicion(
            expert=experts[other],
            sign=f"its task vector is that of {experts[one]} (cosine {cosines_KK[one, other]:.4f}, same length)",
            advice="leave one of them out: two coefficients for one expert cannot be told apart",
        )
        for one in range(len(experts))
        for other in range(one + 1, len(experts))
        if cosines_KK[one, other] > 0.9999 and abs(norms_K[one] / norms_K[other] - 1) < 1e-3
    ]


def _transformed_attention(sources: Sources, k: int, relative_S: Floats, num_heads: int) -> set[int]:
    """Return the projections that are far away while the heads' products stayed where they were."""
    blocks: dict[str, dict[str, int]] = {}
    for s, tensor in enumerate(sources.layout.tensors):
        match = _PROJECTION.match(tensor.name)
        if match and len(tensor.shape) == 2:
            role = _ROLE.get(match["role"], match["role"])
            blocks.setdefault(match["block"], {}).setdefault(role, s)
    found = set()
    for roles in blocks.values():
        for first, second in (("q_proj", "k_proj"), ("v_proj", "o_proj")):
            if first not in roles or second not in roles or "q_proj" not in roles:
                continue
            pair = roles[first], roles[second]
            moved = float(relative_S[list(pair)].max())
            rows = sources.layout.tensors[roles["q_proj"]].shape[0]
            if moved <= FAR or rows % num_heads:
                continue
            width = rows // num_heads
            halves = [[_heads(tensor, role, width) for tensor, role in zip(
                (one(pair[0]), one(pair[1])), (first, second), strict=True)]
                for one in (sources.base, lambda s: sources.expert(k, s))]  # fmt: skip
            if _product_distance(*halves) < NEAR * moved:
                found |= {s for s in pair if relative_S[s] > FAR}
    return found


def _heads(matrix: Tensor, role: str, width: int) -> Tensor:
    """Return (heads, d, model width): a head's rows, or its columns of the output projection."""
    by_rows: Tensor = matrix.T if role == "o_proj" else matrix
    return by_rows.reshape(-1, width, by_rows.shape[1])


def _product_distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return |A1^T B1 - A0^T B0| / |A0^T B0| over all heads, in d x d products only; B's heads serve several of A's.

    |A^T B|^2 = <A A^T, B B^T>: the model's width never enters squared.
    """

    def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        left, right = one[0] @ other[0].mT, one[1] @ other[1].mT
        if len(left) != len(right):  # grouped queries: a key or value head serves several query or output heads
            few, many = (left, right) if len(left) < len(right) else (right, left)
            left, right = few.repeat_interleave(len(many) // len(few), dim=0), many
        return float((left.double() * right.double()).sum())

    size = inner(before, before)
    square = inner(after, after) - 2 * inner(after, before) + size
    return float(np.sqrt(max(square, 0.0) / size)) if size > 0 else float("inf")


def _is_permuted(sources: Sources, k: int, s: int) -> bool:
    """Whether most of the expert's rows (or columns) are rows of the base, at other places; judged by a sample."""
    base, expert = sources.base(s), sources.expert(k, s)
    for before, after in ((base, expert), (base.T, expert.T)):
        sample = torch.linspace(0, len(after) - 1, min(SAMPLE, len(after))).long()
        cosines = _unit(after[sample]) @ _unit(before).T
        best = cosines.max(dim=1)
        if float(((best.values > 0.9) & (best.indices.cpu() != sample).to(best.values.device)).float().mean()) > 0.5:
            return True
    return False


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit


def _num_heads(config: Mapping[str, Any]) -> int | None:
    """Return the number of attention heads that the configuration (or its text part) names."""
    for section in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        for key in ("num_attention_heads", "n_head", "num_heads"):
            if isinstance(section.get(key), int):
                return int(section[key])
    return None


def _over(numerator: Any, denominator: Any, empty: float = np.inf) -> Floats:
    """Return the ratio; 0 / 0 is 0, anything else over 0 is ``empty``."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    ratio: Floats = numerator / np.where(denominator == 0, 1.0, denominator)
    ratio[denominator == 0] = np.where(numerator == 0, 0.0, empty)[denominator == 0]
    return ratio
