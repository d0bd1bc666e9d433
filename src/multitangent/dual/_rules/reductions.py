"""Sums and means over axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import full
from multitangent.dual._registry import register_rule


def _axes(x: Any, dim: Any) -> list[int]:
    """The axes of `x` that are reduced, counted from the front."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.primal.ndim))
    return [axis % x.primal.ndim for axis in ([dim] if isinstance(dim, int) else dim)]


@register_rule(torch.sum, Tensor.sum)
def _sum(out: Tensor, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if x.primal.ndim == 0:
        return x.tangents
    axes = _axes(x, dim)
    if x.is_pending and dtype is None:
        return x.product.summed(x.primal.shape, axes, keepdim)
    t = full(x, *axes)
    return t.sum([axis + 1 for axis in axes], keepdim, dtype=dtype)


@register_rule(torch.mean, Tensor.mean)
def _mean(out: Tensor, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if x.primal.ndim == 0:
        return x.tangents
    axes = [axis + 1 for axis in _axes(x, dim)]
    return x.tangents.mean(axes, keepdim, dtype=dtype)  # a constant axis has itself as its mean
