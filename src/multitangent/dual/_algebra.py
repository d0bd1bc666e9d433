"""The few operations on tangents that rules are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from multitangent.dual._dual_tensor import DualTensor, expanded, pad_rows
from multitangent.dual._factors import Factors
from multitangent.dual._product import Product


def primal(x: Any) -> Any:
    """The value of a dual tensor; anything else unchanged."""
    return x.primal if type(x) is DualTensor else x


def tangents(x: Any, ndim: int | None = None) -> Tensor | None:
    """The tangents of `x`, ``None`` (zero) if it has none.

    Args:
        x: A dual tensor, or anything else.
        ndim: Align with a result of that many axes, as broadcasting does: ``[K, 1, ..., *shape]``.
    """
    if type(x) is not DualTensor:
        return None
    t = x.tangents
    if ndim is not None and t.ndim <= ndim:
        t = t.reshape(t.shape[0], *[1] * (ndim + 1 - t.ndim), *t.shape[1:])
    return t


def full_tangents(x: Any, *axes: int) -> Tensor | None:
    """The tangents of `x` with all axes, or the given axes of `x`, in their full size."""
    return full(x, *axes) if type(x) is DualTensor else None


def full(x: DualTensor, *axes: int) -> Tensor:
    """`full_tangents` of a tensor that is known to be dual."""
    if not axes:
        return expanded(x)
    t, shape = x.tangents, x.primal.shape
    sizes = [-1] * t.ndim
    for axis in axes:
        axis %= len(shape)
        sizes[axis + 1] = shape[axis]
    return t.expand(sizes)


def through_matrix(
    x: DualTensor, of_rows: Callable[[Tensor], Tensor], of_factors: Callable[[Factors], Tensor]
) -> Tensor:
    """The tangents of a function that is linear in a matrix, or in a stack of filters.

    Args:
        x: The matrix ``[m, *rest]``.
        of_rows: From tangents ``[k, m, *rest]`` to those of the result.
        of_factors: The same from tangents that are products of factors.
    """
    factored = x.factored
    return of_rows(expanded(x)) if factored is None else factored.through(of_rows, of_factors)


def add(*terms: Tensor | None) -> Tensor:
    """The sum of tangents; ``None`` is zero, and so are rows that are missing at the end."""
    present = [term for term in terms if term is not None]
    total, *others = present
    for term in others:
        if len(total) != len(term):
            count = max(len(total), len(term))
            total, term = pad_rows(total, count), pad_rows(term, count)
        total = total + term
    return total


def times(x: DualTensor, factor: Tensor | float) -> Product:
    """The tangents of `x` times a factor of no more axes than `x` has, not computed yet."""
    return x.product.times(factor)


def add_to(x: DualTensor, t: Tensor) -> Tensor | Product:
    """``tangents(x) + t`` of equally many axes, in one pass where those of `x` are a product.

    The sum stays a product that waits if all of its tangents are shared by the samples.
    """
    total = Product(t).plus(x.product) if x.is_pending else None
    if total is None:
        return add(x.tangents, t)
    are_shared = all(rows.ndim > 2 and rows.shape[1] == 1 for rows, _ in total.terms)
    return total if are_shared else total.computed()


def scaled(x: Any, factor: Any, ndim: int) -> Tensor | None:
    """The tangents of `x` times a factor that broadcasts with a result of `ndim` axes."""
    t = tangents(x, ndim)
    return None if t is None else t * primal(factor)


def each_sample(x: Any, function: Callable[[Tensor], Tensor], ndim: int) -> Tensor | None:
    """The tangents of `x` through a linear function of a batch, all K of them as one batch.

    Args:
        x: A dual tensor ``[B, *sample]`` or ``[*sample]``, or anything else.
        function: From ``[N, *sample]`` to ``[N, *result]``, for any N.
        ndim: The number of axes of one sample.
    """
    if type(x) is not DualTensor:
        return None
    t = full(x, *range(-ndim, 0))
    if t.ndim == ndim + 1:
        return function(t)
    result = function(t.flatten(0, 1))
    return result.reshape(*t.shape[:2], *result.shape[1:])
