"""Sums, products, powers: functions of two tensors that broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import add, primal, scaled, tangents, times
from multitangent.dual._backward import finite
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._product import Product
from multitangent.dual._registry import not_dense, register_rule
from multitangent.dual._rules.local import elementwise


@register_rule(torch.add, Tensor.add)
def _add(out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Tensor | Product:
    return _sum_of(input, other, alpha, out.ndim)


@register_rule(torch.sub, Tensor.sub, torch.subtract, Tensor.subtract)
def _subtract(out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Tensor | Product:
    return _sum_of(input, other, -alpha, out.ndim)


@register_rule(torch.rsub, Tensor.__rsub__)
def _subtract_from(out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Tensor | Product:
    return _sum_of(other, input, -alpha, out.ndim)


def _sum_of(x: Any, y: Any, alpha: float, ndim: int) -> Tensor | Product:
    """The tangents of ``x + alpha y``, computed later where either is a product already."""
    if not _is_dual(y, ndim):
        if _is_dual(x, ndim) and type(y) is not DualTensor:
            return x.product if x.is_pending else x.tangents
    elif not _is_dual(x, ndim):
        if type(x) is not DualTensor:
            return y.product if alpha == 1 and y.is_pending else _scaled(y, alpha)
    elif x.is_pending or y.is_pending:
        total = x.product.plus(y.product if alpha == 1 else times(y, alpha))
        if total is not None:
            return total
    return add(tangents(x, ndim), scaled(y, alpha, ndim) if alpha != 1 else tangents(y, ndim))


def _is_dual(x: Any, ndim: int) -> bool:
    return type(x) is DualTensor and x.primal.ndim == ndim


def _scaled(x: DualTensor, number: float) -> Tensor | Product:
    return x.tangents if number == 1 else times(x, number)


@register_rule(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply)
def _multiply(out: Tensor, input: Any, other: Any) -> Tensor | Product:
    if out.layout is not torch.strided:
        raise not_dense(torch.mul)
    if isinstance(other, (int, float)):
        return times(input, int(other) if isinstance(other, bool) else other)
    if (waiting := _product_of(input, other, out)) is not None:
        return waiting
    return add(scaled(input, other, out.ndim), scaled(other, input, out.ndim))


def _product_of(x: Any, y: Any, out: Tensor) -> Product | None:
    """The tangents of ``x y``, computed later if one of the two is already a product."""
    if type(x) is not DualTensor or type(y) is not DualTensor:
        return None
    if not (x.is_pending or y.is_pending) or not x.shape == y.shape == out.shape:
        return None
    return _times_own(x, y.primal).plus(_times_own(y, x.primal))


def _times_own(x: DualTensor, factor: Tensor) -> Product:
    """The tangents of `x` times a tensor that others may write into before it is used."""
    product = x.product
    is_kept = any(weight is None for _, weight in product.terms)
    return product.times(factor.clone() if is_kept else factor)


@register_rule(torch.div, Tensor.div, torch.true_divide, Tensor.true_divide)
def _divide(
    out: Tensor, input: Any, other: Any, *, rounding_mode: str | None = None
) -> Tensor | None:
    if rounding_mode is not None:
        return None  # constant almost everywhere
    quotient = tangents(input, out.ndim)
    return add(
        None if quotient is None else quotient / primal(other),
        scaled(other, -out / primal(other), out.ndim),
    )


@register_rule(Tensor.__rdiv__)
def _divide_into(out: Tensor, input: Any, other: Any) -> Tensor | None:
    return _divide(out, other, input)


@register_rule(torch.remainder, Tensor.remainder, Tensor.__mod__)
def _remainder(out: Tensor, input: Any, other: Any) -> Tensor:
    quotient = torch.div(primal(input), primal(other), rounding_mode="floor")
    return add(tangents(input, out.ndim), scaled(other, -quotient, out.ndim))


@register_rule(Tensor.__rmod__)
def _remainder_of(out: Tensor, input: Any, other: Any) -> Tensor:
    return _remainder(out, other, input)


@register_rule(torch.neg, Tensor.neg, torch.negative, Tensor.negative)
def _negate(out: Tensor, x: Any) -> Product:
    return times(x, -1)


@register_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def _power(out: Tensor, x: Any, exponent: Any) -> Any:
    if not isinstance(exponent, (int, float)):
        return elementwise(torch.pow, out, x, exponent)
    base = x.primal
    if exponent == 0:  # constant, and without 0 * inf
        return times(x, torch.zeros_like(base))
    slope = exponent * torch.pow(base, exponent - 1)
    if 0 < exponent < 1:  # infinite at zero, and no factor that may grow further
        return x.tangents * finite(slope)
    return times(x, slope)


@register_rule(Tensor.__rpow__)
def _power_of(out: Tensor, exponent: Any, x: Any) -> Any:
    return _power(out, x, exponent)
