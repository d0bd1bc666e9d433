"""Normalisation over a batch, a group, a layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, primal, tangents, times
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._product import Product
from multitangent.dual._registry import register_rule


class _Statistics(threading.local):
    are_constant = False


_statistics = _Statistics()


@contextmanager
def constant_statistics() -> Iterator[None]:
    """Inside this block mean and variance of a batch are constants along tangents."""
    before, _statistics.are_constant = _statistics.are_constant, True
    try:
        yield
    finally:
        _statistics.are_constant = before


@register_rule(F.batch_norm)
def _batch_norm(
    out: Tensor,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | Product:
    """Running mean and variance do not change along tangents, those of the batch do.

    Inside `constant_statistics` neither do.
    """
    x = primal(input)
    mean, var = running_mean, running_var
    if training or mean is None or var is None:
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    spread = (var + eps).rsqrt()
    through = None
    scale = _channels(spread if weight is None else spread * primal(weight), x.ndim)
    if type(input) is DualTensor and training and not _statistics.are_constant:
        standard = (x - _channels(mean, x.ndim)) * _channels(spread, x.ndim)
        axes = [axis - x.ndim for axis in range(x.ndim) if axis != 1]
        through = _standardized(full(input), standard, scale, axes)
    elif type(input) is DualTensor:
        product = times(input, scale)
        if type(weight) is not DualTensor and type(bias) is not DualTensor:
            return product
        through = product.computed()
    of_weight = _parameter(weight, x.ndim)
    if of_weight is not None:
        of_weight = of_weight * ((x - _channels(mean, x.ndim)) * _channels(spread, x.ndim))
    return add(through, of_weight, _parameter(bias, x.ndim))


def _channels(statistic: Tensor, ndim: int) -> Tensor:
    """``[C]``, aligned with ``[B, C, ...]``."""
    return statistic.reshape(-1, *[1] * (ndim - 2))


def _parameter(parameter: Any, ndim: int) -> Tensor | None:
    """Tangents ``[K, C]`` of a weight or bias, aligned with ``[K, B, C, ...]``."""
    t = tangents(parameter)
    return None if t is None else t.reshape(len(t), 1, t.shape[1], *[1] * (ndim - 2))


@register_rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    out: Tensor,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:
    x = primal(input)
    axes = list(range(-len(normalized_shape), 0))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    spread = (var + eps).rsqrt()
    standard = (x - mean) * spread
    through = None
    if type(input) is DualTensor:
        scale = spread if weight is None else spread * primal(weight)
        through = _standardized(full(input, *axes), standard, scale, axes)
    of_weight = tangents(weight, x.ndim)
    return add(through, None if of_weight is None else of_weight * standard, tangents(bias, x.ndim))


def _standardized(t: Tensor, standard: Tensor, scale: Tensor, axes: list[int]) -> Tensor:
    """Tangents of ``(x - mean) / deviation``, both taken over the axes, times a scale."""
    standard, scale = standard.to(t.dtype), scale.to(t.dtype)
    mean_product = (t * standard).mean(axes, keepdim=True)
    centered = t - t.mean(axes, keepdim=True)
    return torch.addcmul(centered, standard, mean_product, value=-1).mul_(scale)


@register_rule(F.group_norm, torch.group_norm)
def _group_norm(
    out: Tensor,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Tensor:
    x = primal(input)
    groups = x.reshape(len(x), num_groups, -1)
    var, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
    spread = (var + eps).rsqrt()
    standard = (groups - mean) * spread
    through = None
    if type(input) is DualTensor:
        t = full(input, *range(1, x.ndim))
        t = t.reshape(*t.shape[:2], *groups.shape[1:])
        through = _standardized(t, standard, spread, [-1])
        through = through.reshape(*through.shape[:2], *x.shape[1:])
        through = through if weight is None else through * _channels(primal(weight), x.ndim)
    of_weight = _parameter(weight, x.ndim)
    if of_weight is not None:
        of_weight = of_weight * standard.reshape(x.shape)
    return add(through, of_weight, _parameter(bias, x.ndim))


@register_rule(F.instance_norm)
def _instance_norm(
    out: Tensor,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(out, input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return _group_norm(out, input, primal(input).shape[1], weight, bias, eps)


@register_rule(F.rms_norm, torch.rms_norm)
def _rms_norm(
    out: Tensor,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Tensor:
    x = primal(input)
    axes = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    spread = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    standard = x * spread
    through = None
    if type(input) is DualTensor:
        t = full(input, *axes)
        rounded = standard.to(t.dtype)
        mean_product = (t * rounded).mean(axes, keepdim=True)
        scale = spread if weight is None else spread * primal(weight)
        through = torch.addcmul(t, rounded, mean_product, value=-1).mul_(scale.to(t.dtype))
    of_weight = tangents(weight, x.ndim)
    return add(through, None if of_weight is None else of_weight * standard)
