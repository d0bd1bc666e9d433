"""Closed-form functions to minimise, of any number of variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Function:
    """A function of n variables, where to start from, and how long to go on (Section IV-B).

    Args:
        name: What to call it.
        formula: From points ``[..., n]`` to values ``[...]``.
        start: The first coordinate and all others of the start point.
        minimum: The least value, divided by n.
        steps: How many steps of descent the paper takes at most.

    Examples:
        >>> sphere = FUNCTIONS["sphere"]
        >>> sphere(sphere.start_point(4)), sphere.steps
        (tensor(4.), 1000)

        One of your own, which sums over the last axis only:

        >>> bowl = Function("bowl", lambda x: x.pow(4).sum(-1), start=(1.0, 1.0))
        >>> bowl(torch.ones(5, 3)).shape
        torch.Size([5])
    """

    name: str
    formula: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: float = 0.0
    steps: int = 1000

    def __call__(self, points: Tensor) -> Tensor:
        """The values ``[...]`` at points ``[..., n]``."""
        return self.formula(points)

    def start_point(self, dimension: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Where descent begins, ``[n]``."""
        first, others = self.start
        point = torch.full((dimension,), others, dtype=dtype)
        point[0] = first
        return point


def _sphere(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _rosenbrock(x: Tensor) -> Tensor:
    left, right = x[..., :-1], x[..., 1:]
    return (100 * (right - left.square()).square() + (1 - left).square()).sum(-1)


def _styblinski_tang(x: Tensor) -> Tensor:
    return (0.5 * x**4 - 8 * x.square() + 2.5 * x).sum(-1)


# The smallest root of 2 x^3 - 16 x + 2.5, where the Styblinski-Tang function has its minimum.
_LOWEST = -2.903534027771177

FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        function.name: function
        for function in (
            Function("sphere", _sphere, (-1.0, -1.0)),
            Function("rosenbrock", _rosenbrock, (-1.0, 0.0), steps=25_000),
            Function(
                "styblinski-tang",
                _styblinski_tang,
                (0.0, 0.0),
                minimum=0.5 * _LOWEST**4 - 8 * _LOWEST**2 + 2.5 * _LOWEST,
            ),
        )
    }
)
