"""The products of a linear layer: K tangents of its input, and K tangents of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full
from multitangent.dual._deferred import Factored
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._factors import Factors
from multitangent.dual._kernels import linear
from multitangent.dual._product import Factor, Product


def through_weight(x: DualTensor, weight: Tensor) -> Tensor:
    """``x' W^T`` for all K tangents x' of the input ``[*lead, in]``.

    ReLU leaves tangents t that all samples share, times a factor f of each sample. For these
    ``(f t) W^T = f (t W)^T``. That is less work where there are fewer outputs than samples, and it
    needs no tensor of all tangents of all samples.
    """
    pending = x.held(Product)
    if pending is None or not any(_is_cheaper(t, factor, weight) for t, factor in pending.terms):
        return linear(full(x, -1), weight)
    return add(*(_through(t, factor, weight) for t, factor in pending.terms))


def _through(t: Tensor, factor: Factor, weight: Tensor) -> Tensor:
    """``(f t) W^T`` for one term of a product."""
    if isinstance(factor, Tensor) and _is_cheaper(t, factor, weight):
        weights = t.reshape(len(t), 1, -1) * weight.to(t.dtype)
        return by_rows(factor, weights)
    rows = Product(t, factor).computed()
    return linear(rows.expand(*rows.shape[:-1], weight.shape[-1]), weight)


def _is_cheaper(t: Tensor, factor: Factor, weight: Tensor) -> bool:
    """Whether it is less work to multiply tangents ``[K, 1, ..., in]`` with the weights first."""
    return (
        isinstance(factor, Tensor)
        and t.shape[-1] == factor.shape[-1] == weight.shape[-1]
        and t.numel() == len(t) * t.shape[-1]
        and factor.ndim == t.ndim - 1
        and factor.numel() > weight.numel()
    )


def by_rows(x: Tensor, t: Tensor) -> Tensor:
    """``x W'^T`` for all K tangents ``[K, out, in]``: one product [rows, in] x [in, K out]."""
    product = linear(x.to(t.dtype), t.flatten(0, 1))
    return product.reshape(*x.shape[:-1], *t.shape[:2]).movedim(-2, 0)


def with_factors(
    through: Tensor | None, x: Tensor, factored: Factored, shift: Tensor | None
) -> Tensor:
    """``through + x W'^T + shift`` for tangents W' that are products of factors.

    Args:
        through: The tangents through x, of which nobody else knows.
        x: ``[*lead, in]``.
        factored: The tangents of a matrix ``[out, in]``.
        shift: Those of what is added.
    """
    if len(factored.parts) == 1 and isinstance(factors := factored.parts[0], Factors):
        return _in_one_pass(through, x, factors, shift)
    product = factored.through(
        lambda t: by_rows(x, t), lambda factors: _in_one_pass(None, x, factors, None)
    )
    return add(through, product, shift)


def _in_one_pass(
    through: Tensor | None, x: Tensor, factors: Factors, shift: Tensor | None
) -> Tensor:
    """The same of factors alone: [rows, in] x [in, K rank], then K products of rank columns."""
    (count, outputs, rank), lead = factors.left.shape, x.shape[:-1]
    inner = linear(x.to(factors.dtype), factors.right.flatten(0, 1))
    inner = inner.reshape(lead.numel(), count, rank).transpose(0, 1)
    outer = factors.left.mT
    if shift is not None and _fits(shift, (count, *[1] * len(lead), outputs), factors):
        inner = F.pad(inner, (0, 1), value=1.0)
        outer, shift = torch.cat([outer, shift.reshape(count, 1, outputs)], 1), None
    shape = count, *lead, outputs
    if through is not None and _fits(through, shape, factors) and through.is_contiguous():
        through.view(count, lead.numel(), outputs).baddbmm_(inner, outer)
        return add(through, shift)
    return add(through, torch.bmm(inner, outer).reshape(shape), shift)


def _fits(t: Tensor, shape: Sequence[int], factors: Factors) -> bool:
    return t.shape == tuple(shape) and t.dtype is factors.dtype
