"""The orthogonal projection of the gradient onto the span of the tangents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent._conditions import holds
from multitangent.aggregation._aggregator import Aggregator, Measured

_SINGULAR = 1e-6  # the ratio of eigenvalues from which on they are computed one by one


@dataclass(frozen=True)
class Projection(Aggregator):
    """``c = G^+ d``: the closest gradient that the tangents allow (Definition 5, Eq. 9).

    Exact when the gradient lies in the span of the tangents, so for K >= n independent ones.
    The tangents are brought to equal length, then directions in which they hardly differ are left
    out: dependent, duplicate and zero tangents are normal input.

    Args:
        rtol: Eigenvalues of the normalised Gram matrix below this fraction of the largest count
            as zero. By default the larger of K times the rounding of float64 and the square of
            100 times the precision of the directional derivatives, beyond which those are noise, at
            most 1e-6.

    Examples:
        >>> import torch
        >>> tangents = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> coefficients = Projection()(tangents @ tangents.T, tangents @ torch.tensor([3.0, 4.0]))
        >>> (coefficients @ tangents.double()).round(decimals=6)
        tensor([3., 4.], dtype=torch.float64)
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"`rtol` should be at least 0 and below 1. Found {self.rtol!r}.")

    def _coefficients(self, measured: Measured) -> Tensor:
        lengths = measured.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        unit = torch.where(lengths > 0, 1 / lengths, 0.0)
        normalized = unit.unsqueeze(-1) * measured.gram * unit.unsqueeze(-2)
        within = unit * measured.jvps  # [B, K]
        tolerance = self._tolerance(measured)
        if measured.dimension is not None and measured.dimension < len(unit[0]):
            factor = _pivoted_factor(normalized, measured.dimension)
            return _solved_in_span(factor, within, tolerance) * unit
        solution = _solved(normalized, within, tolerance)
        if solution is None:
            solution = _solved_without_small(normalized, within, tolerance)
        return solution * unit

    def _tolerance(self, measured: Measured) -> float:
        if self.rtol is not None:
            return self.rtol
        rounding = measured.gram.shape[-1] * torch.finfo(torch.float64).eps
        return max(rounding, min((100 * measured.precision) ** 2, 1e-6))

    def expected_squared_norm(self, num_tangents: int, dimension: int) -> float:
        return min(num_tangents / dimension, 1.0)

    def expected_alignment(self, num_tangents: int, dimension: int) -> float:
        return min(num_tangents / dimension, 1.0)


def _solved(gram: Tensor, jvps: Tensor, tolerance: float) -> Tensor | None:
    """``G^-1 d`` by Cholesky factors, ``None`` unless G is far from singular."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(gram), upper=False)
    # |L^-1|^2 is the sum of the inverse eigenvalues, and none is larger than K.
    trace = inverse.square().sum((-2, -1))
    far = (failed == 0) & (trace * gram.shape[-1] * max(tolerance, _SINGULAR) < 1)
    if not holds(far.all()):
        return None
    return ((jvps.unsqueeze(-2) @ inverse.mT) @ inverse).squeeze(-2)


def _solved_without_small(gram: Tensor, jvps: Tensor, tolerance: float) -> Tensor:
    """``G^+ d``, eigenvalues below a fraction of the largest counting as zero."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > tolerance * values[..., -1:]
    inverse = torch.where(kept, 1 / values, 0.0)
    return (((jvps.unsqueeze(-2) @ vectors) * inverse.unsqueeze(-2)) @ vectors.mT).squeeze(-2)


def _pivoted_factor(gram: Tensor, rank: int) -> Tensor:
    """L ``[B, rank, K]`` with ``L^T L = G`` for a Gram matrix of no higher rank.

    Cholesky's algorithm with the largest remaining diagonal element as the pivot.
    """
    left = gram.diagonal(dim1=-2, dim2=-1)
    factor = gram.new_zeros(len(gram), rank, gram.shape[-1])
    samples = torch.arange(len(gram), device=gram.device)
    for step in range(rank):
        value, pivot = left.max(-1, keepdim=True)
        known = factor[:, :step]
        at_pivot = known[samples, :, pivot[:, 0]].unsqueeze(1)  # [B, 1, step]
        remaining = gram[samples, pivot[:, 0]] - (at_pivot @ known).squeeze(1)
        row = torch.where(value > 0, remaining / value.sqrt(), 0.0)
        factor[:, step] = row
        left = left - row.square()
    return factor


def _solved_in_span(factor: Tensor, jvps: Tensor, tolerance: float) -> Tensor:
    """``G^+ d`` for ``G = L^T L``, whose eigenvalues are those of the smaller ``L L^T``."""
    values, vectors = torch.linalg.eigh(factor @ factor.mT)
    inverse = torch.where(values > tolerance * values[..., -1:], 1 / values, 0.0)
    basis = vectors.mT @ factor  # [B, rank, K]
    along = (basis @ jvps.unsqueeze(-1)).squeeze(-1) * inverse.square()
    return (along.unsqueeze(-2) @ basis).squeeze(-2)
