"""Tangents along the coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource, check_count


@dataclass(frozen=True)
class StandardBasis(TangentSource):
    """The first K vectors ``e_1, ..., e_K`` of the standard basis, sites counted one after another.

    With K = n this is full forward-mode differentiation, and every aggregator but `Mean` gives
    the exact gradient (Section III-C). Tangents beyond the n-th are zero.

    Args:
        num_tangents: K, the number of tangents.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1.

    Examples:
        >>> from multitangent import Projection, forward_gradient
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> forward_gradient(lambda x: (x * x).sum(), x, StandardBasis(3), Projection())[1]
        tensor([2., 4., 6.])
    """

    num_tangents: int

    def __post_init__(self) -> None:
        check_count(self.num_tangents)

    def draw(self, request: Request) -> Tensor:
        size, start = prod(request.shape), request.offset
        block = torch.zeros(self.num_tangents, size, dtype=request.dtype, device=request.device)
        rows = range(max(start, 0), min(start + size, self.num_tangents))
        if rows:
            index = torch.arange(rows.start, rows.stop, device=request.device)
            block[index, index - start] = 1
        return block.view(self.num_tangents, 1, *request.shape)
