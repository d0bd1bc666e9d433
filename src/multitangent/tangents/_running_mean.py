"""Guesses of the gradient from the forward gradients of the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multitangent.tangents._guesses import GuessSource, StatefulSource, guess_block
from multitangent.tangents._observation import Observation
from multitangent.tangents._request import Request


@dataclass(frozen=True)
class RunningMean(GuessSource):
    """The running mean of the forward gradients so far, as a guess.

    Weights have one such mean. Activations have one for every class, if the target is one class
    index per sample (the gradients of samples of a class have much in common, those of different
    classes hardly), and else one for all samples.

    Args:
        num_tangents: K. Site i has its guess in tangent i modulo K.
        decay: What a step leaves of the mean before it, at least 0 and below 1; with 0 it is the
            last gradient.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        On one batch the projection finds more of the gradient in every step:

        >>> from multitangent import ForwardGradient, Normal
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(30, 2)
        >>> gradient = ForwardGradient(
        ...     model, torch.nn.MSELoss(), Normal(2) + RunningMean(decay=0.0), perturb="weights"
        ... )
        >>> lengths = []
        >>> for step in range(3):
        ...     model.zero_grad()
        ...     value = gradient(torch.ones(4, 30), torch.zeros(4, 2))
        ...     lengths.append(gradient.diagnostics.gradient_norm)
        >>> bool(lengths[0] < lengths[1] < lengths[2])
        True
    """

    num_tangents: int = 1
    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` should be at least 0 and below 1. Found {self.decay!r}.")

    def init(self) -> _Means:
        return _Means(self)


class _Means(StatefulSource[RunningMean]):
    """The means of one gradient, ``[classes or 1, *shape]`` by site."""

    def __init__(self, options: RunningMean) -> None:
        super().__init__(options)
        self.means: dict[str, Tensor] = {}

    def draw(self, request: Request) -> Tensor:
        classes = _classes(request)
        means = self._of(request, classes)
        guess = means if classes is None else means[classes]
        if request.batch is not None:
            guess = guess.expand(request.batch, *request.shape)
        return guess_block(guess.to(request.dtype), request, self.num_tangents)

    @torch.no_grad()
    def update(self, observation: Observation) -> None:
        for name, request in observation.requests.items():
            gradient, classes = observation.gradients[name], _classes(request)
            means = self._of(request, classes)
            if classes is None:
                classes = torch.zeros(len(gradient), dtype=torch.long, device=gradient.device)
            count = torch.bincount(classes, minlength=len(means)).to(gradient.dtype)
            total = torch.zeros_like(means).index_add_(0, classes, gradient)
            seen = count > 0
            now = total[seen] / count[seen].view(-1, *[1] * len(request.shape))
            means[seen] = self.options.decay * means[seen] + (1 - self.options.decay) * now
            self.means[name] = means

    def _of(self, request: Request, classes: Tensor | None) -> Tensor:
        """The means of a site so far, with zeros for classes that come for the first time."""
        means = self.means.get(request.name)
        count = 1 if classes is None else int(classes.max()) + 1
        if means is not None and len(means) >= count:
            return means
        zeros = torch.zeros(count, *request.shape, dtype=request.dtype, device=request.device)
        if means is not None:
            zeros[: len(means)] = means
        return zeros

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = {name: mean.clone() for name, mean in state.get("means", {}).items()}


def _classes(request: Request) -> Tensor | None:
    """The class of every sample, if the target says it."""
    target = request.target
    if request.batch is None or not isinstance(target, Tensor) or target.ndim != 1:
        return None
    return None if target.is_floating_point() else target
