"""Tangents with independent random entries of mean 0 and variance 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource, check_count


@dataclass(frozen=True)
class Normal(TangentSource):
    """K independent tangents ``v ~ N(0, I)``: the paper's choice (Section IV-A).

    Args:
        num_tangents: K, the number of tangents.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1.

    Examples:
        >>> Normal(12) + Rademacher(4)
        Normal(num_tangents=12) + Rademacher(num_tangents=4)
    """

    num_tangents: int

    def __post_init__(self) -> None:
        check_count(self.num_tangents)

    def draw(self, request: Request) -> Tensor:
        return request.random.normal(self.num_tangents)

    def draw_one(self, request: Request, k: int) -> Tensor:
        if request.samples is not None:  # a generator draws all rows of a sample
            return super().draw_one(request, k)
        return Normal(1).draw(replace(request, first=request.first + k))


@dataclass(frozen=True)
class Rademacher(TangentSource):
    """K independent tangents with entries +1 and -1, each with probability one half.

    Of all distributions with independent entries that give an unbiased forward gradient
    (Property 1) this one has the least variance, for its entries have the least fourth moment.

    Args:
        num_tangents: K, the number of tangents.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1.

    Examples:
        >>> Rademacher(16).num_tangents
        16
    """

    num_tangents: int

    def __post_init__(self) -> None:
        check_count(self.num_tangents)

    def draw(self, request: Request) -> Tensor:
        return request.random.rademacher(self.num_tangents)

    def draw_one(self, request: Request, k: int) -> Tensor:
        if request.samples is not None:  # a generator draws all rows of a sample
            return super().draw_one(request, k)
        return Rademacher(1).draw(replace(request, first=request.first + k))
