"""Guesses of the gradient from the forward gradients of the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multitangent._deferred_checks import check
from multitangent.tangents._guesses import GuessSource, StatefulSource, guess_block
from multitangent.tangents._observation import Observation
from multitangent.tangents._request import Request


@dataclass(frozen=True)
class RunningMean(GuessSource):
    """The running mean of the forward gradients so far, as a guess.

    Weights have one such mean. Activations have one for every class, if the target is one integer
    per sample (the gradients of samples of a class have much in common, those of different classes
    hardly), and else one for all samples. Where a site's values have another shape than before,
    its mean starts anew.

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
    """The means of one gradient, ``[labels or 1, *shape]`` by site."""

    def __init__(self, options: RunningMean) -> None:
        super().__init__(options)
        self.means: dict[str, Tensor] = {}
        self.labels: Tensor | None = None  # those met so far, in the order of the means

    def draw(self, request: Request) -> Tensor:
        rows = _rows(self.labels, _labels(request))
        means = self._of(request, 0)
        guess = torch.cat([means, means.new_zeros(1, *request.shape)])  # for labels not met yet
        return guess_block(guess[rows.clamp(max=len(means))], request, self.num_tangents)

    @torch.no_grad()
    def update(self, observation: Observation) -> None:
        labels = _labels(next(iter(observation.requests.values())))
        self.labels = _extended(self.labels, labels)
        # A graph that was traced with some labels must work with others.
        rows = _rows(self.labels, labels).clamp(max=len(self.labels) - 1)
        means = {}
        for name, request in observation.requests.items():
            gradient = observation.gradients[name]
            before = self._of(request, len(self.labels))
            ones = gradient.new_ones(len(rows), dtype=torch.int64)  # counted without rounding
            count = ones.new_zeros(len(before)).index_add_(0, rows, ones).to(gradient.dtype)
            total = torch.zeros_like(before).index_add_(0, rows, gradient.to(before.dtype))
            seen = (count > 0).view(-1, *[1] * len(request.shape))
            now = total / count.clamp(min=1).view(-1, *[1] * len(request.shape))
            mixed = self.options.decay * before + (1 - self.options.decay) * now
            means[name] = torch.where(seen, mixed, before)
        self.means = self.means | means

    def _of(self, request: Request, count: int) -> Tensor:
        """At least so many means of a site, zeros where none is known."""
        means = self.means.get(request.name)
        if means is None or means.shape[1:] != request.shape:  # none, or those of another layer
            means = torch.zeros(0, *request.shape, dtype=request.dtype, device=request.device)
        missing = max(count - len(means), 0)
        return torch.cat([means, means.new_zeros(missing, *request.shape)])

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "labels": self.labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = dict(state.get("means", {}))
        # An older state has a mean for every number up to the largest label.
        count = max((len(means) for means in self.means.values()), default=0)
        self.labels = state.get("labels", torch.arange(count))


def _labels(request: Request) -> Tensor:
    """The class of every sample if the target says it, and one class for all if not."""
    target = request.target
    one_each = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    if request.batch is None or not one_each:
        return torch.zeros(request.batch or 1, dtype=torch.long, device=request.device)
    labels: Tensor = target.long()
    return labels


def _rows(known: Tensor | None, labels: Tensor) -> Tensor:
    """The place of every label among those that are known, behind their end if it is not."""
    if known is None or not len(known):
        return torch.zeros_like(labels)
    ordered, order = known.to(labels.device).sort()
    place = torch.searchsorted(ordered, labels).clamp(max=len(known) - 1)
    return torch.where(ordered[place] == labels, order[place], len(known))


def _extended(known: Tensor | None, labels: Tensor) -> Tensor:
    """The labels that are known, and behind them those that come for the first time."""
    if known is None or not len(known):
        return torch.unique(labels)
    known = known.to(labels.device)
    is_new = _rows(known, labels) == len(known)
    if check(~is_new.any()):
        return known
    return torch.cat([known, torch.unique(labels[is_new])])
