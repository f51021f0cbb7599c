"""A tensor as vectors, whole or by row or column: their inner products, and merges that weigh each row or column.

Shape letters: K experts, S tensors, R rows and C columns of a tensor as a matrix (``TensorInfo.matrix``), V vectors:
1, R or C; E elements of one of them.
"""

from typing import Literal

import torch
from torch import Tensor

from evomerge.kernels.layout import BLOCK
from evomerge.kernels.sources import Sources

Vectors = Literal["tensor", "rows", "columns"]

TINY = 1e-8
"""Norm from which a vector has a direction; a shorter one counts as perpendicular to all others."""


def inner_products(sources: Sources, s: int, vectors: Vectors) -> Tensor:
    """Return the inner products of base and task vectors, (V, K+1, K+1), float64 on the CPU; the base comes first.

    One pass over the sources. Products of float32 numbers are exact in float64, and what tells experts apart does not
    drown in what they share with the base, as it would in inner products of whole experts.
    """
    size = 1 + sources.num_experts
    total = torch.zeros(1, size, size, dtype=torch.float64, device=sources.device)
    rows_of: list[Tensor] = []
    for rows, _ in sources.chunks(s):
        held = [sources.base(s, rows), *(sources.task_vector(k, s, rows) for k in range(sources.num_experts))]
        vectors_VKE = torch.stack(held, dim=1).double()
        if vectors == "columns":
            vectors_VKE = vectors_VKE.permute(2, 1, 0).contiguous()
        products = vectors_VKE @ vectors_VKE.mT
        if vectors == "rows":
            rows_of.append(products)
        else:
            # Row by row and then summed is ten times faster than one product of very long and very few rows.
            total = total + (products.sum(0, keepdim=True) if vectors == "tensor" else products)
    return (torch.cat(rows_of) if rows_of else total).cpu()


def of_experts(products: Tensor) -> Tensor:
    """Return the inner products (V, K+1, K+1) of base and whole experts from those of base and task vectors."""
    mixture = torch.eye(products.shape[-1], dtype=torch.float64)
    mixture[:, 0] = 1.0  # expert k is base + task vector k
    return mixture @ products @ mixture.T


def lengths_and_cosines(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms (V, N) and cosines (V, N, N) of vectors by their inner products (V, N, N).

    A vector's cosine with itself is exactly 1, so that it alone gives it back exactly; all cosines of one of no length
    are 0. A cosine near 1 is good to 2^-52 and its angle only to 2^-26; every use of an angle here is smooth in the
    cosine, so that the digits come back.
    """
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    has_direction = lengths > TINY
    safe = torch.where(has_direction, lengths, 1.0)
    cosines = (products / (safe[..., :, None] * safe[..., None, :])).clamp(-1.0, 1.0)
    cosines = torch.where(has_direction[..., :, None] & has_direction[..., None, :], cosines, 0.0)
    cosines.diagonal(dim1=-2, dim2=-1).copy_(has_direction)
    return lengths, cosines


def vectors_of(sources: Sources, s: int, asked: Vectors) -> Vectors:
    """Return what is ``asked`` for a matrix; a tensor of one dimension is one vector, whatever is asked."""
    return asked if len(sources.layout.tensors[s].shape) > 1 else "tensor"


def angles(sources: Sources, s: int, asked: Vectors, relative: bool) -> tuple[Tensor, Tensor]:
    """Return lengths (V, K) and cosines (V, K, K) of the task vectors if ``relative``, else of the whole experts."""
    products = inner_products(sources, s, vectors_of(sources, s, asked))
    return lengths_and_cosines((products if relative else of_experts(products))[:, 1:, 1:])


def lincomb_vectors(out_P: Tensor, sources: Sources, s: int, weights_KV: Tensor, vectors: Vectors) -> None:
    """Write ``w[0] * base + sum_k w[k] * tau_k`` to tensor s of ``out_P``, each of its vectors with its own weights.

    Shapes: weights_KV (K+1, V), float64 on the CPU. Summed in float32 as ``lincomb`` sums, so that here
    too the weights of the base or of one expert give it back bit for bit; rounded once.
    """
    segment = sources.layout.segments[s]
    factors = torch.cat([weights_KV[:1] - weights_KV[1:].sum(0), weights_KV[1:]]).float().to(sources.device)
    for rows, place in sources.chunks(s):
        base_factor, *expert_factors = factors[:, rows, None] if vectors == "rows" else factors[:, None]
        total = sources.base(s, rows) * base_factor
        for k, factor in enumerate(expert_factors):
            total.addcmul_(sources.expert(k, s, rows), factor)
        out_P[place] = total.view(-1).to(out_P.dtype)
    out_P[segment.stop : -(-segment.stop // BLOCK) * BLOCK] = 0.0
