"""``G^+ d`` for Gram matrices whose diagonal is 1 or 0, by the cheapest of three ways."""

from __future__ import annotations

import torch
from torch import Tensor

from multitangent._deferred_checks import check
from multitangent.aggregation._broadcast import rows_times

_SINGULAR = 1e-6  # the ratio of eigenvalues from which on they are computed one by one


def pseudoinverse_product(
    gram: Tensor, jvps: Tensor, tolerance: float, rank: int | None = None
) -> Tensor:
    """``G^+ d``, eigenvalues of G below a fraction of the largest counting as zero.

    Args:
        gram: G, ``[*samples, K, K]``, where `samples` broadcasts against `losses`.
        jvps: d, ``[*losses, K]``.
        tolerance: That fraction.
        rank: A bound of the rank of G, if it is known.

    Returns:
        ``[*losses, K]``.
    """
    if rank is not None and rank < gram.shape[-1]:
        return _solved_in_span(_pivoted_factor(gram, rank), jvps, tolerance)
    solution = _solved(gram, jvps, tolerance)
    return _solved_without_small(gram, jvps, tolerance) if solution is None else solution


def _solved(gram: Tensor, jvps: Tensor, tolerance: float) -> Tensor | None:
    """``G^-1 d`` by Cholesky factors, ``None`` unless G is far from singular."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(gram), upper=False)
    # |L^-1|^2 is the sum of the inverse eigenvalues, and none is larger than K.
    trace = inverse.square().sum((-2, -1))
    far = (failed == 0) & (trace < 1 / (gram.shape[-1] * max(tolerance, _SINGULAR)))
    if not check(far.all()):
        return None
    return rows_times(rows_times(jvps, inverse.mT), inverse)


def _solved_without_small(gram: Tensor, jvps: Tensor, tolerance: float) -> Tensor:
    """``G^+ d`` by eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > tolerance * values[..., -1:]
    inverse = torch.where(kept, 1 / values, 0.0)
    return rows_times(rows_times(jvps, vectors) * inverse, vectors.mT)


def _pivoted_factor(gram: Tensor, rank: int) -> Tensor:
    """L ``[*samples, rank, K]`` with ``L^T L = G`` for a Gram matrix of no higher rank.

    Cholesky's algorithm with the largest remaining diagonal element as the pivot.
    """
    matrices = gram.reshape(-1, *gram.shape[-2:])
    left = matrices.diagonal(dim1=-2, dim2=-1)
    factor = gram.new_zeros(len(matrices), rank, gram.shape[-1])
    each = torch.arange(len(matrices), device=gram.device)
    for step in range(rank):
        value, pivot = left.max(-1, keepdim=True)
        rows = factor[:, :step]
        at_pivot = rows[each, :, pivot[:, 0]].unsqueeze(1)  # [*, 1, step]
        remaining = matrices[each, pivot[:, 0]] - (at_pivot @ rows).squeeze(1)
        row = torch.where(value > 0, remaining / value.sqrt(), 0.0)
        factor[:, step] = row
        left = left - row.square()
    return factor.reshape(*gram.shape[:-2], rank, -1)


def _solved_in_span(factor: Tensor, jvps: Tensor, tolerance: float) -> Tensor:
    """``G^+ d`` for ``G = L^T L``, whose eigenvalues are those of the smaller ``L L^T``."""
    values, vectors = torch.linalg.eigh(factor @ factor.mT)
    inverse = torch.where(values > tolerance * values[..., -1:], 1 / values, 0.0)
    basis = vectors.mT @ factor  # [*samples, rank, K]
    return rows_times(rows_times(jvps, basis.mT) * inverse.square(), basis)
