"""The kernel of every rule that is linear in effective coefficients, and the products that price these.

Shape letters: K experts, S tensors, P padded elements, B blocks (P = 1024 B), C columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from evomerge.kernels.launch import launch
from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Dense, LowRank, Sources
from evomerge.kernels.tiles import LincombTile

CHUNK = 2**18  # elements of a float32 temporary that stays in the cache


def lincomb(out_P: Tensor, sources: Sources, weights_KS: Tensor, changed: Sequence[int] | None = None) -> None:
    """Write ``w[0] * base + sum_k w[k] * tau_k`` to ``out_P``; of the ``changed`` tensors only, if given.

    Shapes: weights_KS (K+1, S), float64: row 0 scales the base, the others the task vectors. Task vectors of
    checkpoints are never formed: the base is read once with the coefficient ``w[0] - sum_k w[k]``, so that all-zero
    weights give the base and one expert at 1 gives that expert, bit for bit (but for the sign of a zero). Adapters
    stay factored: their tensors are summed in float32, all ranks in one product, and rounded once.
    """
    layout = sources.layout
    factored: set[int] = set()
    for expert in sources.experts:
        factored |= expert.factors.keys() if isinstance(expert, LowRank) else set()
    flat = changed
    if factored:
        asked = range(sources.num_tensors) if changed is None else changed
        flat = [s for s in asked if s not in factored]
        factored &= set(asked)
    rows, floats_CB = _linear_columns(sources, weights_KS)
    launch(LincombTile(), out_P, layout.runs(flat), sources.base_P, rows, [floats_CB])
    for s in sorted(factored):
        _lincomb_factored(out_P, sources, weights_KS, (rows, floats_CB), s)


def _linear_columns(sources: Sources, weights_KS: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the dense experts' buffers, each once, and the factors (1 + rows, B) of base and rows."""
    dense = [(k, expert) for k, expert in enumerate(sources.experts, start=1) if isinstance(expert, Dense)]
    checkpoints = [k for k, expert in dense if not expert.is_task_vector and expert.scales_B is None]
    columns_CS = torch.cat([weights_KS[:1] - weights_KS[checkpoints].sum(0), weights_KS[[k for k, _ in dense]]])
    floats_CB = sources.spread(columns_CS.float())
    for c, (_, expert) in enumerate(dense, start=1):
        if expert.scales_B is not None:
            floats_CB[c] *= expert.scales_B
            if not expert.is_task_vector:
                floats_CB[0] -= floats_CB[c]
    rows = {id(expert.buffer_P): expert.buffer_P for _, expert in dense}
    if len(rows) < len(dense):
        places, parts_CB = list(rows), floats_CB
        floats_CB = parts_CB.new_zeros(parts_CB.shape[1], 1 + len(rows)).T
        floats_CB[0] = parts_CB[0]
        for part_B, (_, expert) in zip(parts_CB[1:], dense, strict=True):
            floats_CB[1 + places.index(id(expert.buffer_P))] += part_B
    return list(rows.values()), floats_CB


def _lincomb_factored(
    out_P: Tensor, sources: Sources, weights_KS: Tensor, dense: tuple[list[Tensor], Tensor], s: int
) -> None:
    rows, floats_CB = dense
    [run] = sources.layout.runs([s])
    segment, blocks = sources.layout.segments[s], slice(run.start * BLOCK, run.stop * BLOCK)
    total_P = torch.empty(blocks.stop - blocks.start, device=out_P.device)
    launch(
        LincombTile(), total_P, [slice(0, run.stop - run.start)], sources.base_P[blocks],
        [row[blocks] for row in rows], [floats_CB[:, run]],
    )  # fmt: skip
    factors = [
        (float(weights_KS[k, s]) * expert.factors[s][0], expert.factors[s][1])
        for k, expert in enumerate(sources.experts, start=1)
        if isinstance(expert, LowRank) and s in expert.factors
    ]
    total_E = total_P[: segment.stop - segment.start]
    for num_rows in sorted({len(b) for b, _ in factors}):  # a whole task vector among them is one column
        left = torch.cat([b for b, _ in factors if len(b) == num_rows], dim=1)
        right = torch.cat([a for b, a in factors if len(b) == num_rows])
        total_E.view(num_rows, -1).addmm_(left, right)
    out_P[blocks] = total_P.to(out_P.dtype)


def task_vector_products(gradient_E: Tensor, sources: Sources, s: int) -> Tensor:
    """Return <gradient, base> and <gradient, tau_k> of tensor s, shape (K+1,), float64.

    These are the derivatives of a loss in the rows of ``lincomb``'s weights: dL/dw[k] = <dL/dtheta, tau_k>.
    """
    segment = sources.layout.segments[s]
    products = torch.zeros(sources.num_experts + 1, dtype=torch.float64, device=gradient_E.device)
    for start in range(0, len(gradient_E), CHUNK):
        here = slice(segment.start + start, min(segment.start + start + CHUNK, segment.stop))
        gradient = gradient_E[start : start + CHUNK].float()
        base = sources.base_P[here].float()
        products[0] += gradient @ base
        blocks = slice(here.start // BLOCK, -(-here.stop // BLOCK))
        by_block: dict[int, Tensor] = {}  # of a buffer that experts may share
        for k, expert in enumerate(sources.experts, start=1):
            if not isinstance(expert, Dense):
                continue
            if expert.scales_B is None:
                products[k] += gradient @ _vector(expert, here, base)
                continue
            key = id(expert.buffer_P)
            if key not in by_block:
                terms = gradient * _vector(expert, here, base)
                by_block[key] = pad(terms, (0, -len(terms) % BLOCK)).view(-1, BLOCK).sum(1)
            products[k] += by_block[key] @ expert.scales_B[blocks]
    for k, expert in enumerate(sources.experts, start=1):
        if isinstance(expert, LowRank) and s in expert.factors:
            b, a = expert.factors[s]
            products[k] = ((gradient_E.float().view(b.shape[0], -1) @ a.T) * b).double().sum()
    return products


def _vector(expert: Dense, here: slice, base_E: Tensor) -> Tensor:
    """Return so many entries of a task vector, float32, before any factor of its blocks."""
    held_E = expert.buffer_P[here].float()
    return held_E if expert.is_task_vector else held_E - base_E
