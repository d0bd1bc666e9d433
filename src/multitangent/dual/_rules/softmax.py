"""Softmax and its logarithm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import full
from multitangent.dual._registry import register_rule


def _axis(x: Any, dim: int | None) -> int:
    """The axis of the tangents, without `dim` the one PyTorch falls back on."""
    ndim = x.primal.ndim
    return (dim % ndim if dim is not None else (0 if ndim in (0, 1, 3) else 1)) + 1


@register_rule(F.softmax, torch.softmax, Tensor.softmax)
def _softmax(
    out: Tensor, x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    if out.ndim == 0:
        return torch.zeros_like(x.tangents)
    axis = _axis(x, dim)
    weighted = full(x, axis - 1) * out
    return weighted - out * weighted.sum(axis, keepdim=True)


@register_rule(F.log_softmax, torch.log_softmax, Tensor.log_softmax)
def _log_softmax(
    out: Tensor, x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    if out.ndim == 0:
        return torch.zeros_like(x.tangents)
    axis = _axis(x, dim)
    t = full(x, axis - 1)
    mean = (t * out.exp()).sum(axis, keepdim=True)
    return t - mean
