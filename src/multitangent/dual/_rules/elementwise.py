"""Functions of one number: the tangents are multiplied by the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import times
from multitangent.dual._backward import finite
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._product import Product
from multitangent.dual._registry import register_rule
from multitangent.dual._rules.local import elementwise

_SIXTH = 0.1666666716337204  # of single precision, as PyTorch has it


def _elementwise(*functions: Callable[..., Any], derivative: Callable[..., Tensor]) -> None:
    """Register ``derivative(out, x)``, a tensor of its own, of functions of single numbers."""

    @register_rule(*functions)
    def _rule(out: Tensor, x: Any) -> Product:
        return times(x, derivative(out, x.primal))


_elementwise(torch.exp, Tensor.exp, derivative=lambda y, x: y.clone())
_elementwise(torch.expm1, Tensor.expm1, derivative=lambda y, x: y + 1)
_elementwise(torch.log, Tensor.log, derivative=lambda y, x: 1 / x)
_elementwise(torch.log1p, Tensor.log1p, derivative=lambda y, x: 1 / (1 + x))
_elementwise(torch.rsqrt, Tensor.rsqrt, derivative=lambda y, x: -0.5 * y / x)
_elementwise(torch.reciprocal, Tensor.reciprocal, derivative=lambda y, x: -y * y)
_elementwise(torch.square, Tensor.square, derivative=lambda y, x: 2 * x)
_elementwise(torch.abs, Tensor.abs, derivative=lambda y, x: torch.sign(x))
_elementwise(torch.sin, Tensor.sin, derivative=lambda y, x: torch.cos(x))
_elementwise(torch.cos, Tensor.cos, derivative=lambda y, x: -torch.sin(x))
_elementwise(torch.tanh, Tensor.tanh, F.tanh, derivative=lambda y, x: 1 - y * y)
_elementwise(torch.sigmoid, Tensor.sigmoid, F.sigmoid, derivative=lambda y, x: y * (1 - y))
_elementwise(torch.relu, Tensor.relu, F.relu, derivative=lambda y, x: y.sign())
_elementwise(torch._standard_gamma, derivative=lambda y, x: torch._standard_gamma_grad(x, y))
_elementwise(F.hardsigmoid, derivative=lambda y, x: ((x > -3) & (x < 3)) * x.new_tensor(_SIXTH))


@register_rule(torch.sqrt, Tensor.sqrt)
def _sqrt(out: Tensor, x: Any) -> Tensor:
    slope: Tensor = x.tangents * finite(0.5 / out)  # not a factor that may grow further
    return slope


@register_rule(F.leaky_relu)
def _leaky_relu(out: Tensor, x: Any, negative_slope: float = 0.01) -> Product:
    slope = (x.primal > 0).to(out.dtype) * (1 - negative_slope) + negative_slope
    return times(x, slope)


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
def _clamp(out: Tensor, x: Any, min: Any = None, max: Any = None) -> Any:
    if type(x) is not DualTensor or any(isinstance(bound, Tensor) for bound in (min, max)):
        return elementwise(torch.clamp, out, x, min, max)
    inside = torch.ones_like(out, dtype=torch.bool)
    if min is not None:
        inside &= x.primal >= min
    if max is not None:
        inside &= x.primal <= max
    return x.tangents * inside
