"""Distances between all pairs of points, and vectors of unit length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full_tangents, primal
from multitangent.dual._backward import slopes
from multitangent.dual._dual_tensor import make_dual
from multitangent.dual._registry import register_composite, register_rule


@register_rule(torch.cdist)
def _cdist(
    out: Tensor, x1: Any, x2: Any, p: float = 2.0, compute_mode: str | None = None
) -> Tensor:
    """Distances ``[..., P, R]`` of points ``[..., P, M]`` and ``[..., R, M]``."""
    x, y = primal(x1).unsqueeze(-2), primal(x2).unsqueeze(-3)
    if p == 2:
        slope = torch.where(out == 0, 0, out.reciprocal()).unsqueeze(-1) * (x - y)
    else:
        shape = (*out.shape, x.shape[-1])
        slope = _slope(x.expand(shape), y.expand(shape), p)
    return add(_along(full_tangents(x1), "kapm", slope), _along(full_tangents(x2), "karm", -slope))


def _slope(x: Tensor, y: Tensor, p: float) -> Tensor:
    """The derivative of the distance of each pair by its first point."""
    dual = make_dual(x.unsqueeze(-2), x.new_zeros(0, *[1] * (x.ndim + 1)))
    return slopes(torch.cdist, (dual, y.unsqueeze(-2), p), {})[0].squeeze(-2)


def _along(t: Tensor | None, axes: str, slope: Tensor) -> Tensor | None:
    """Tangents of points ``[K, ..., P or R, M]`` along all slopes ``[..., P, R, M]``."""
    if t is None:
        return None
    lead = slope.shape[:-3]
    t = t.reshape(len(t), *[1] * (slope.ndim - t.ndim), *t.shape[1:])
    t = t.expand(-1, *lead, -1, -1).flatten(1, -3) if lead else t.unsqueeze(1)
    product = torch.einsum(
        f"{axes},aprm->kapr", t, slope.reshape(-1, *slope.shape[-3:]).to(t.dtype)
    )
    return product.reshape(len(t), *slope.shape[:-1])


@register_rule(F.pdist)
def _pdist(out: Tensor, input: Any, p: float = 2.0) -> Tensor:
    x = input.primal
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    t: Any = full_tangents(input)
    slope = _slope(x[first], x[second], p)
    return torch.einsum("knm,nm->kn", t[:, first] - t[:, second], slope.to(t.dtype))


@register_composite(Tensor.renorm)
def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """`torch.renorm` in functions that have rules."""
    axes = [axis for axis in range(input.ndim) if axis != dim % input.ndim]
    length = torch.linalg.vector_norm(input, p, axes, keepdim=True)
    return input * torch.where(length > maxnorm, maxnorm / (length + 1e-7), 1.0)


register_composite(torch.renorm)(renorm)


@register_composite(F.normalize)
def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """`F.normalize` in functions that have rules."""
    length = input.norm(p, dim, keepdim=True).clamp_min(eps)
    if out is None:
        return input / length.expand_as(input)
    return torch.div(input, length.expand_as(input), out=out)
