"""The sum of the single-tangent forward gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured


@dataclass(frozen=True)
class Sum(Aggregator):
    """``c = d``: the sum of the K forward gradients (Definition 3).

    Examples:
        >>> import torch
        >>> Sum()(torch.eye(2), torch.tensor([3.0, 4.0]))
        tensor([3., 4.], dtype=torch.float64)
    """

    def coefficients(self, measured: Measured) -> Tensor:
        return measured.jvps

    def expected_squared_norm(self, num_tangents: int, dimension: int) -> float:
        return num_tangents * (dimension + num_tangents + 1)

    def expected_alignment(self, num_tangents: int, dimension: int) -> float:
        return num_tangents
