"""Random tangents as long at each position of a site as the gradient is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multitangent.dual import Factored
from multitangent.tangents._observation import Needs, Observation
from multitangent.tangents._positions import mean_square, positions
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource


@dataclass(frozen=True)
class ScaledByRMS(TangentSource):
    """The tangents of another source, scaled to the size that the gradient has at each position.

    ``w = sigma v`` with one sigma for every token, or every cell of a feature map (not for every
    channel). sigma^2 is the running mean of the squared entries of the forward gradients there, a
    share `spread` of it evened out over the site, and 1 at the site's largest. Nearly all of the
    gradient of a vision transformer is the class token's; tangents of one length everywhere measure
    little but noise. Such tangents act as if there were fewer dimensions, ``sum sigma^2`` in place
    of n: random guesses have that much less noise, and `Feedback` learns that much faster. Values
    without positions, such as those of a linear layer, keep the tangents that they had, and so do
    weights.

    The mean of such forward gradients is that of the others times sigma^2: exact where the gradient
    is largest, and less where it is small.

    Args:
        inner: Where the tangents come from.
        decay: What a step leaves of the running means before it, at least 0 and below 1.
        spread: The share of a site's energy that goes everywhere alike, above 0 and at most 1, so
            that no position is lost from sight.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from multitangent import Normal
        >>> ScaledByRMS(Normal(4))
        ScaledByRMS(inner=Normal(num_tangents=4), decay=0.9, spread=0.1)
    """

    inner: TangentSource
    decay: float = 0.9
    spread: float = 0.1
    num_tangents: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tangents", self.inner.num_tangents)
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` should be at least 0 and below 1. Found {self.decay!r}.")
        if not 0 < self.spread <= 1:
            raise ValueError(f"`spread` should be above 0 and at most 1. Found {self.spread!r}.")

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return (self.inner,)

    def draw(self, request: Request) -> Tensor:
        return self.init().draw(request)  # before the first step all positions are alike

    def has_factors(self, request: Request) -> bool:
        return self.inner.has_factors(request)

    def draw_factors(self, request: Request) -> Factored:
        return self.inner.draw_factors(request)

    @property
    def mixes(self) -> bool:
        return self.inner.mixes

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.inner.mixing(gram, dimension)

    def init(self) -> TangentSource:
        return _RunningSizes(self)


class _RunningSizes(TangentSource):
    """The sizes of the gradient at the positions of one model's sites."""

    def __init__(self, options: ScaledByRMS) -> None:
        self.options = options
        self.inner = options.inner.init()
        self.num_tangents = options.num_tangents
        self.squares: dict[str, Tensor] = {}  # the mean squared entry at each position of a site

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return (self.inner,)

    def needs(self, step: int) -> Needs:
        return self.inner.needs(step) | Needs.UPDATE

    def __repr__(self) -> str:
        return repr(self.options)

    def draw(self, request: Request) -> Tensor:
        rows = self.inner.draw(request)
        squares = self.squares.get(request.name)
        if request.batch is None or squares is None or squares.numel() == 1:
            return rows
        if squares.shape != positions(request.shape):  # those of another layer
            return rows
        spread = self.options.spread
        mixed = (1 - spread) * squares + spread * squares.mean()
        largest = mixed.max()
        scale = torch.where(largest == 0, 1.0, mixed / largest)
        return rows * scale.sqrt().to(rows.dtype)

    def has_factors(self, request: Request) -> bool:
        return self.inner.has_factors(request)

    def draw_factors(self, request: Request) -> Factored:
        return self.inner.draw_factors(request)  # weights keep the tangents that they had

    @property
    def mixes(self) -> bool:
        return self.inner.mixes

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.inner.mixing(gram, dimension)

    @torch.no_grad()
    def update(self, observation: Observation) -> None:
        self.inner.update(observation)
        squares = {}
        for name, gradient in observation.gradients.items():
            now = mean_square(gradient, tuple(gradient.shape[1:]))
            before = self.squares.get(name, now)
            if before.shape != now.shape:  # the squares of another layer
                before = now
            squares[name] = self.options.decay * before + (1 - self.options.decay) * now
        self.squares = self.squares | squares

    def state_dict(self) -> dict[str, Any]:
        return {"squares": dict(self.squares), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.squares = dict(state.get("squares", {}))
        self.inner.load_state_dict(state.get("inner", {}))
