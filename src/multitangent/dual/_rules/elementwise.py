"""Functions of one number: the tangents are multiplied by the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, primal, scaled, times
from multitangent.dual._product import Product
from multitangent.dual._registry import register_rule


def _elementwise(*functions: Callable[..., Any], derivative: Callable[..., Tensor]) -> None:
    """Register ``derivative(out, x)``, a tensor of its own, of functions of single numbers."""

    @register_rule(*functions)
    def _rule(out: Tensor, x: Any) -> Product:
        return times(x, derivative(out, x.primal))


_elementwise(torch.exp, Tensor.exp, derivative=lambda y, x: y.clone())
_elementwise(torch.expm1, Tensor.expm1, derivative=lambda y, x: y + 1)
_elementwise(torch.log, Tensor.log, derivative=lambda y, x: 1 / x)
_elementwise(torch.log1p, Tensor.log1p, derivative=lambda y, x: 1 / (1 + x))
_elementwise(torch.sqrt, Tensor.sqrt, derivative=lambda y, x: 0.5 / y)
_elementwise(torch.rsqrt, Tensor.rsqrt, derivative=lambda y, x: -0.5 * y / x)
_elementwise(torch.reciprocal, Tensor.reciprocal, derivative=lambda y, x: -y * y)
_elementwise(torch.square, Tensor.square, derivative=lambda y, x: 2 * x)
_elementwise(torch.abs, Tensor.abs, derivative=lambda y, x: torch.sign(x))
_elementwise(torch.sin, Tensor.sin, derivative=lambda y, x: torch.cos(x))
_elementwise(torch.cos, Tensor.cos, derivative=lambda y, x: -torch.sin(x))
_elementwise(torch.tanh, Tensor.tanh, F.tanh, derivative=lambda y, x: 1 - y * y)
_elementwise(torch.sigmoid, Tensor.sigmoid, F.sigmoid, derivative=lambda y, x: y * (1 - y))
_elementwise(torch.relu, Tensor.relu, F.relu, derivative=lambda y, x: y.sign())


@register_rule(F.leaky_relu)
def _leaky_relu(out: Tensor, x: Any, negative_slope: float = 0.01) -> Product:
    slope = (x.primal > 0).to(out.dtype) * (1 - negative_slope) + negative_slope
    return times(x, slope)


@register_rule(F.rrelu)
def _rrelu(
    out: Tensor, x: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Product:
    z = x.primal
    drawn = torch.where(z == 0, (lower + upper) / 2, out / z)  # a slope at 0 leaves no trace
    return times(x, torch.where(z > 0, torch.ones_like(z), drawn))


@register_rule(F.silu)
def _silu(out: Tensor, x: Any) -> Product:
    gate = torch.sigmoid(x.primal)
    return times(x, gate + out * (1 - gate))


@register_rule(F.mish)
def _mish(out: Tensor, x: Any) -> Product:
    z = x.primal
    gate = torch.tanh(F.softplus(z))
    return times(x, gate + z * torch.sigmoid(z) * (1 - gate * gate))


@register_rule(F.gelu)
def _gelu(out: Tensor, x: Any, approximate: str = "none") -> Product:
    z = x.primal
    slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate=approximate)
    return times(x, slope)


@register_rule(F.softplus)
def _softplus(out: Tensor, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Product:
    z = x.primal * beta
    return times(x, torch.where(z > threshold, torch.ones_like(z), torch.sigmoid(z)))


@register_rule(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip)
def _clamp(out: Tensor, x: Any, min: Any = None, max: Any = None) -> Tensor:
    value, low, high = primal(x), primal(min), primal(max)
    inside = torch.ones_like(out, dtype=torch.bool)
    below, above = torch.zeros_like(inside), torch.zeros_like(inside)
    if low is not None:
        inside &= value >= low
        below |= value < low
    if high is not None:
        inside &= value <= high
        above |= value > high
    if low is not None and high is not None:
        crossed = torch.as_tensor(high < low, device=out.device)
        below, above = below & (low < high), above | crossed
    return add(*(scaled(*pair, out.ndim) for pair in ((x, inside), (min, below), (max, above))))
