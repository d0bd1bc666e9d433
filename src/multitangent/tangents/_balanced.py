"""Random tangents as long at each site as the gradient is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multitangent.tangents._source import Lesson, Request, TangentSource


@dataclass(frozen=True)
class Balanced(TangentSource):
    """The tangents of another source, scaled at every site to the size that the gradient has there.

    ``w_s = sigma_s v_s``, where sigma_s^2 is the running mean of the squared entries of the forward
    gradients at site s, over their mean at all sites. In a deep network gradients differ by orders
    of magnitude from site to site. Tangents of one length everywhere then give each site the noise
    of the largest gradient; balanced ones give each an equal signal-to-noise ratio, and their
    directional derivatives tell more, in the mean ``sum sigma_s^2 |grad_s|^2``.

    Args:
        inner: Where the tangents come from.
        decay: What a step leaves of the running means before it, at least 0 and below 1.

    Raises:
        ValueError: If `decay` is out of range.

    Examples:
        >>> from multitangent import Normal
        >>> Balanced(Normal(4))
        Balanced(inner=Normal(num_tangents=4), decay=0.99)
    """

    inner: TangentSource
    decay: float = 0.99
    num_tangents: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tangents", self.inner.num_tangents)
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` should be at least 0 and below 1. Found {self.decay!r}.")

    def draw(self, request: Request) -> Tensor:
        return self.started().draw(request)  # before the first step all sites are alike

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.inner.mixing(gram, dimension)

    def started(self) -> TangentSource:
        return _Sizes(self)


class _Sizes(TangentSource):
    """The sizes of the gradient at the sites of one model."""

    learns = True

    def __init__(self, options: Balanced) -> None:
        self.options = options
        self.inner = options.inner.started()
        self.num_tangents = options.num_tangents
        self.squares: dict[str, Tensor] = {}  # the mean squared entry at a site
        self.scales: dict[str, float] = {}

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return (self.inner,)

    def __repr__(self) -> str:
        return repr(self.options)

    def draw(self, request: Request) -> Tensor:
        return self.inner.draw(request) * self.scales.get(request.name, 1.0)

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.inner.mixing(gram, dimension)

    @torch.no_grad()
    def learn(self, lesson: Lesson) -> None:
        self.inner.learn(lesson)
        for name, gradient in lesson.gradients.items():
            now = gradient.double().square().mean()
            before = self.squares.get(name, now)
            self.squares[name] = self.options.decay * before + (1 - self.options.decay) * now
        self._scale({name: gradient[0].numel() for name, gradient in lesson.gradients.items()})

    def _scale(self, dimensions: Mapping[str, int]) -> None:
        squares = torch.stack([self.squares[name] for name in dimensions])
        counts = squares.new_tensor(list(dimensions.values()))
        mean = (squares * counts).sum() / counts.sum()
        scales = (squares / mean).sqrt() if mean > 0 else torch.ones_like(squares)
        self.scales = dict(zip(dimensions, scales.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        state = {"squares": dict(self.squares), "scales": dict(self.scales)}
        return state | {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.squares = dict(state.get("squares", {}))
        self.scales = dict(state.get("scales", {}))
        self.inner.load_state_dict(state.get("inner", {}))
