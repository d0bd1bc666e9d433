"""Linear layers and matrix products: K rows, or K·B, in one multiplication."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, full_tangents, primal, tangents
from multitangent.dual._deferred import Deferred, Factored
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._linear_products import by_rows, through_weight, with_factors
from multitangent.dual._linear_tangents import FEWEST_THAT_WAIT, tangents_that_wait
from multitangent.dual._registry import register_rule


@register_rule(F.linear)
def _linear(out: Tensor, x: Any, weight: Any, bias: Any = None) -> Tensor | Deferred:
    if primal(weight).ndim == 1:  # one output, without an axis of its own
        return add(_left(x, primal(weight)), _right(primal(x), weight), tangents(bias, out.ndim))
    if (
        out.numel() >= FEWEST_THAT_WAIT
        and (waiting := tangents_that_wait(out, x, weight, bias)) is not None
    ):
        return waiting
    through = through_weight(x, primal(weight)) if type(x) is DualTensor else None
    shift = tangents(bias, out.ndim)
    if type(weight) is not DualTensor:
        return add(through, shift)
    if (factored := weight.factored) is not None:
        return with_factors(through, primal(x), factored, shift)
    return add(through, by_rows(primal(x), full(weight)), shift)


@register_rule(
    torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv
)
def _matmul(out: Tensor, input: Any, other: Any) -> Tensor:
    through = _left(input, primal(other))
    if (factored := _factored_matrix(primal(input), other)) is not None:
        return with_factors(through, primal(input), factored.transposed(), None)
    return add(through, _right(primal(input), other))


def _factored_matrix(x: Tensor, y: Any) -> Factored | None:
    """The factors of the tangents of a matrix y that dense rows are multiplied with."""
    if type(y) is not DualTensor or y.primal.ndim != 2 or x.layout is not torch.strided:
        return None
    return y.factored


@register_rule(Tensor.__rmatmul__)
def _matmul_reflected(out: Tensor, x: Any, y: Any) -> Tensor:
    return _matmul(out, y, x)


def _left(x: Any, y: Tensor) -> Tensor | None:
    """The tangents of ``x @ y`` through x."""
    t = full_tangents(x, -1)
    if t is None:
        return None
    if x.primal.ndim == 1:
        t = t.unsqueeze(-2)
    y = y.to(t.dtype)
    column = y.unsqueeze(-1) if y.ndim == 1 else y
    product = torch.matmul(_lead(t, column.ndim), column)
    return _drop(product, x.primal.ndim == 1, y.ndim == 1)


def _right(x: Tensor, y: Any) -> Tensor | None:
    """The tangents of ``x @ y`` through y."""
    if type(y) is not DualTensor:
        return None
    if x.layout is not torch.strided:
        return _sparse_product(x, full(y))
    t = full(y, -1 if y.primal.ndim == 1 else -2)
    if y.primal.ndim == 1:
        t = t.unsqueeze(-1)
    x = x.to(t.dtype)
    row = x.unsqueeze(0) if x.ndim == 1 else x
    product = torch.matmul(row, _lead(t, row.ndim))
    return _drop(product, x.ndim == 1, y.primal.ndim == 1)


@register_rule(torch.sparse.mm)
def _sparse_mm(out: Tensor, x: Any, y: Any, reduce: str = "sum") -> Tensor:
    if reduce != "sum":
        raise ValueError(
            f"`reduce` of torch.sparse.mm should be 'sum' where tangents are carried. Found "
            f"{reduce!r}. Try `scatter_reduce`."
        )
    return _matmul(out, x, y)


def _sparse_product(x: Tensor, t: Tensor) -> Tensor:
    """A sparse matrix times tangents ``[K, N]`` or ``[K, N, D]``, as columns of one matrix."""
    product: Tensor = x.to(t.dtype) @ t.movedim(1, 0).flatten(1)
    return product.reshape(len(product), len(t), *t.shape[2:]).movedim(0, 1)


def _lead(t: Tensor, ndim: int) -> Tensor:
    """Tangents of a matrix, aligned with a batch of matrices of `ndim` axes."""
    return t.reshape(t.shape[0], *[1] * (ndim + 1 - t.ndim), *t.shape[1:])


def _drop(product: Tensor, row: bool, column: bool) -> Tensor:
    """Take away the axes that stood in for those a vector does not have."""
    if column:
        product = product.squeeze(-1)
        return product.squeeze(-1) if row else product
    return product.squeeze(-2) if row else product


@register_rule(torch.addmm, Tensor.addmm, torch.sparse.addmm)
def _addmm(out: Tensor, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    shift = tangents(bias, out.ndim)
    if alpha == beta == 1 and (factored := _factored_matrix(primal(x), y)) is not None:
        return with_factors(_left(x, primal(y)), primal(x), factored.transposed(), shift)
    dual = type(x) is DualTensor or type(y) is DualTensor
    return add(
        None if shift is None else beta * shift, alpha * _matmul(out, x, y) if dual else None
    )
