"""Random functions whose numbers do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual import DualTensor, primal, register_composite, result_of
from multitangent.objective._record import BatchRecord, sample_axis

_NAMES = (
    "bernoulli", "binomial", "multinomial", "normal", "poisson", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "_standard_gamma",
)  # fmt: skip
_METHODS = (
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_",
    "multinomial", "normal_", "random_", "uniform_",
)  # fmt: skip
RANDOM: frozenset[Callable[..., Any]] = frozenset(
    [getattr(torch, name) for name in _NAMES] + [getattr(Tensor, name) for name in _METHODS]
)


class Randomness:
    """Keeps what random functions return for the whole batch, and takes the rows of a part.

    Args:
        rows: The samples at hand.
        batch_size: The number of samples of the whole batch.
        record: What the run of the whole batch left, or is to leave; ``None`` for neither.
        is_whole: Whether this is the run of the whole batch, which fills the record.
    """

    def __init__(
        self, rows: slice, batch_size: int, record: BatchRecord | None, is_whole: bool
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._record = record
        self._is_whole = is_whole
        self._calls = 0

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if func is torch._standard_gamma and isinstance(args[0], DualTensor):
            return result_of(func, self(func, args[0].primal), args, kwargs)
        out = func(*args, **kwargs)
        if self._record is None:
            return out
        call, self._calls = self._calls, self._calls + 1
        drawn, values = self._record.random, primal(out)
        if self._is_whole:
            drawn.append(values.detach().clone())
        elif call < len(drawn):
            with torch.no_grad():
                values.copy_(self._own(drawn[call], values))
        return out

    def _own(self, whole: Tensor, values: Tensor) -> Tensor:
        """The entries of the samples at hand; where there are none, those that were drawn."""
        place = sample_axis(whole.shape, values.shape, self._rows, self._batch_size)
        if place is not None:
            axis, count = place
            return whole.narrow(axis, count * self._rows.start, values.shape[axis])
        return whole if whole.shape == values.shape else values


# Functions that draw inside of PyTorch's own code, in terms of those that can be followed.


@register_composite(F.gumbel_softmax)
def _gumbel_softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    place = soft.argmax(dim, keepdim=True)
    return torch.zeros_like(primal(soft)).scatter(dim, place, 1.0) - soft.detach() + soft


def _self_normalizing(
    input: Tensor, p: float, training: bool, inplace: bool, shape: list[int]
) -> Tensor:
    """Dropout for SELU, which keeps mean and variance (arXiv:1706.02515)."""
    if not training or p == 0:
        return input
    low = -1.7580993408473766
    kept = torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(1 - p)
    scale = ((1 - p) * (1 + p * low**2)) ** -0.5 if p < 1 else 0.0
    shift = scale * low * (1 - kept - p)
    return input.mul_(kept * scale).add_(shift) if inplace else input * (kept * scale) + shift


@register_composite(F.alpha_dropout)
def _alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _self_normalizing(input, p, training, inplace, list(input.shape))


@register_composite(F.feature_alpha_dropout)
def _feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    shape = [*input.shape[:2], *[1] * (input.ndim - 2)]
    return _self_normalizing(input, p, training, inplace, shape)


@register_composite(F.rrelu)
def _rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2, inplace)
    slope = torch.empty_like(primal(input)).uniform_(lower, upper)
    slope = torch.where(primal(input) <= 0, slope.detach(), 1.0)
    return input.mul_(slope) if inplace else input * slope
