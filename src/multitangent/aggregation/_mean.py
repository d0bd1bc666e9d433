"""The mean of the single-tangent forward gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured


@dataclass(frozen=True)
class Mean(Aggregator):
    """``c = d / K``: the mean of the K forward gradients (Definition 4).

    Unbiased for tangents whose entries are independent with mean 0 and variance 1 (Property 1).

    Examples:
        >>> import torch
        >>> Mean()(torch.eye(2), torch.tensor([3.0, 4.0]))
        tensor([1.5000, 2.0000], dtype=torch.float64)
    """

    def coefficients(self, measured: Measured) -> Tensor:
        return measured.jvps / measured.jvps.shape[-1]

    def expected_squared_norm(self, num_tangents: int, dimension: int) -> float:
        return (dimension + num_tangents + 1) / num_tangents

    def expected_alignment(self, num_tangents: int, dimension: int) -> float:
        return 1.0
