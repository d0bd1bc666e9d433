"""The products of a linear layer's input with K tangents of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add
from multitangent.dual._deferred import Factored
from multitangent.dual._factors import Factors
from multitangent.dual._kernels import linear


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
