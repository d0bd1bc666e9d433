"""Sums, products, powers: functions of two tensors that broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import add, add_to, primal, scaled, tangents
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._registry import register_rule


@register_rule(torch.add, Tensor.add)
def _add(out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Tensor:
    if alpha != 1:
        return add(tangents(x, out.ndim), scaled(y, alpha, out.ndim))
    if _dual_of(x, out.ndim) and _dual_of(y, out.ndim):
        return add_to(y, x.tangents) if y.factors[1] is not None else add_to(x, y.tangents)
    return add(tangents(x, out.ndim), tangents(y, out.ndim))


def _dual_of(x: Any, ndim: int) -> bool:
    return type(x) is DualTensor and x.primal.ndim == ndim


@register_rule(torch.sub, Tensor.sub, torch.subtract, Tensor.subtract)
def _subtract(out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Tensor:
    return add(tangents(x, out.ndim), scaled(y, -alpha, out.ndim))


@register_rule(torch.rsub, Tensor.__rsub__)
def _subtract_from(out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Tensor:
    return add(scaled(x, -alpha, out.ndim), tangents(y, out.ndim))


@register_rule(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply)
def _multiply(out: Tensor, x: Any, y: Any) -> Tensor:
    return add(scaled(x, y, out.ndim), scaled(y, x, out.ndim))


@register_rule(torch.div, Tensor.div, torch.true_divide, Tensor.true_divide)
def _divide(out: Tensor, x: Any, y: Any, *, rounding_mode: str | None = None) -> Tensor | None:
    if rounding_mode is not None:
        return None  # constant almost everywhere
    quotient = tangents(x, out.ndim)
    return add(
        None if quotient is None else quotient / primal(y),
        scaled(y, -out / primal(y), out.ndim),
    )


@register_rule(Tensor.__rdiv__)
def _divide_into(out: Tensor, x: Any, y: Any) -> Tensor | None:
    return _divide(out, y, x)


@register_rule(torch.neg, Tensor.neg, torch.negative, Tensor.negative)
def _negate(out: Tensor, x: Any) -> Tensor:
    return -x.tangents


@register_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def _power(out: Tensor, x: Any, exponent: Any) -> Tensor:
    base, power = primal(x), primal(exponent)
    slope = None
    if type(x) is DualTensor:
        # At exponent 0 the value is constant, at 1 the slope is: neither should see 0 * inf.
        slope = (
            torch.zeros_like(base)
            if isinstance(power, (int, float)) and power == 0
            else (power * torch.pow(base, power - 1))
        )
        if isinstance(power, Tensor):
            slope = torch.where(power == 0, torch.zeros_like(slope), slope)
    growth = None
    if type(exponent) is DualTensor:
        logarithm = torch.log(torch.as_tensor(base, dtype=out.dtype, device=out.device))
        growth = torch.where((out == 0) & (power >= 0), torch.zeros_like(out), out * logarithm)
    return add(scaled(x, slope, out.ndim), scaled(exponent, growth, out.ndim))


@register_rule(Tensor.__rpow__)
def _power_of(out: Tensor, exponent: Any, x: Any) -> Tensor:
    return _power(out, x, exponent)
