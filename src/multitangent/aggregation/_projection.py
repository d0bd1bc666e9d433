"""The orthogonal projection of the gradient onto the span of the tangents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._pseudoinverse import pseudoinverse_product


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

    def coefficients(self, measured: Measured) -> Tensor:
        lengths = measured.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        unit = lengths.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        gram = unit.unsqueeze(-1) * measured.gram * unit.unsqueeze(-2)
        jvps, tolerance = unit * measured.jvps, self._tolerance(measured)
        return unit * pseudoinverse_product(gram, jvps, tolerance, measured.dimension)

    def _tolerance(self, measured: Measured) -> float:
        if self.rtol is not None:
            return self.rtol
        rounding = measured.gram.shape[-1] * torch.finfo(torch.float64).eps
        return max(rounding, min((100 * measured.precision) ** 2, 1e-6))

    def expected_squared_norm(self, num_tangents: int, dimension: int) -> float:
        return min(num_tangents / dimension, 1.0)

    def expected_alignment(self, num_tangents: int, dimension: int) -> float:
        return min(num_tangents / dimension, 1.0)
