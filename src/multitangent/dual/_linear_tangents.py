"""Tangents of the output of a linear layer, not multiplied yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from multitangent._deferred_checks import tracing
from multitangent.dual._algebra import add, primal
from multitangent.dual._deferred import Deferred, Drawn, Factored
from multitangent.dual._dual_tensor import DualTensor, expanded
from multitangent.dual._factors import Factors
from multitangent.dual._kernels import linear
from multitangent.dual._linear_products import by_rows, with_factors
from multitangent.dual._product import carried

FEWEST_THAT_WAIT = 2**18  # numbers in an output whose tangents are multiplied later
_WIDER = 4  # how many times more outputs than inputs its layer has, as one of a vocabulary


class LinearTangents(Deferred):
    """The tangents ``x' W^T + x W'^T + b'`` of ``x W^T + b`` with V outputs, not multiplied yet.

    They take ``K N D`` numbers in place of ``K N V`` for N rows of D inputs. Views that leave the
    V outputs of a row together keep them as they are. A loss asks for their products with its own
    derivative (`along`), some rows at a time. Any other function multiplies them.

    Args:
        x: The input ``[*lead, D]``.
        of_x: Its tangents ``[K, *lead, D]``, axes of size 1 where they are constant.
        weight: ``[V, D]``.
        of_weight: Its tangents ``[K, V, D]``.
        of_bias: Those of the bias, ``[K, V]``.
        dtype: The type of the tangents.
        axis: The axis of the result that counts the outputs; the others are those of `x` in order.
    """

    __slots__ = ("_dtype", "_version", "axis", "of_bias", "of_weight", "of_x", "weight", "x")

    def __init__(
        self,
        x: Tensor,
        of_x: Tensor | None,
        weight: Tensor,
        of_weight: Tensor | Deferred | None,
        of_bias: Tensor | None,
        dtype: torch.dtype,
        axis: int,
    ) -> None:
        self.x = x
        self.of_x = None if of_x is None else of_x.expand(len(of_x), *x.shape)
        self.weight = weight
        self.of_weight = of_weight
        self.of_bias = of_bias
        self._dtype = dtype
        self.axis = axis
        self._version = weight._version

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the tangents, the K in front included."""
        return self.x.ndim + 1

    def computed(self) -> Tensor:
        self._check()
        through = None if self.of_x is None else linear(self.of_x, self.weight)
        shift = self.of_bias
        if shift is not None:
            shift = shift.reshape(len(shift), *[1] * (self.x.ndim - 1), -1)
        of_weight = self._of_weight()
        if isinstance(of_weight, Factored):
            total = with_factors(through, self.x, of_weight, shift)
        else:
            total = add(_with_rows(through, self.x, of_weight), shift)
        return carried(total.movedim(-1, self.axis + 1), self.dtype)

    def along(self, rows: slice, gradients: Tensor) -> Tensor:
        """The inner products ``[K, n]`` of the tangents of some rows with other vectors.

        Args:
            rows: Some of the N rows, where `x` is ``[N, D]``.
            gradients: One vector for each of them, ``[n, V]``.
        """
        self._check()
        terms = []
        if self.of_x is not None:
            through = gradients.to(self.weight.dtype) @ self.weight
            terms.append(_inner(self.of_x[:, rows], through, gradients.dtype))
        x = self.x[rows]
        of_weight = self._of_weight()
        if isinstance(of_weight, Factored):
            terms.append(
                of_weight.through(
                    lambda t: _along_rows(t, x, gradients),
                    lambda factors: _along_factors(factors, x, gradients),
                )
            )
        elif of_weight is not None:
            terms.append(_along_rows(of_weight, x, gradients))
        if self.of_bias is not None:
            terms.append(self.of_bias.to(gradients.dtype) @ gradients.mT)
        return add(*terms)

    def as_rows(self) -> LinearTangents:
        """The same of rows ``[N, V]``, with the tangents of the weights drawn once for all."""
        self._check()
        of_x = None if self.of_x is None else self.of_x.flatten(1, -2)
        x = self.x.reshape(-1, self.x.shape[-1])
        of_weight = self._of_weight()
        return LinearTangents(x, of_x, self.weight, of_weight, self.of_bias, self.dtype, 1)

    def reshaped(self, shape: Sequence[int]) -> LinearTangents | None:
        """The same in another shape, ``None`` if it does not keep the outputs of a row together."""
        if self.axis != self.x.ndim - 1 or len(shape) == 0 or shape[-1] != len(self.weight):
            return None
        lead, last = shape[:-1], self.x.shape[-1]
        of_x = None if self.of_x is None else self.of_x.reshape(len(self.of_x), *lead, last)
        return self._with(self.x.reshape(*lead, last), of_x, len(lead))

    def permuted(self, axes: Sequence[int]) -> LinearTangents:
        """The same with its axes in another order."""
        lead = [axis - (axis > self.axis) for axis in axes if axis != self.axis]
        x = self.x.permute(*lead, -1)
        of_x = self.of_x
        if of_x is not None:
            of_x = of_x.permute(0, *[axis + 1 for axis in lead], -1)
        return self._with(x, of_x, list(axes).index(self.axis))

    def transposed(self, axis: int, other: int) -> LinearTangents:
        """The same with two axes exchanged."""
        axes = list(range(self.x.ndim))
        axes[axis], axes[other] = axes[other], axes[axis]
        return self.permuted(axes)

    def indexed(self, items: tuple[Any, ...]) -> LinearTangents | None:
        """The tangents of some rows, ``None`` if the index takes some of the outputs only.

        Args:
            items: The parts of an index that moves no axes.
        """
        if self.axis != self.x.ndim - 1 or not _leaves_last(items, self.x.ndim):
            return None
        x = self.x[items]
        of_x = None if self.of_x is None else self.of_x[(slice(None), *items)]
        return self._with(x, of_x, x.ndim - 1)

    def to(self, dtype: torch.dtype) -> LinearTangents:
        """The same in another type."""
        self._check()
        return LinearTangents(
            self.x, self.of_x, self.weight, self.of_weight, self.of_bias, dtype, self.axis
        )

    def _with(self, x: Tensor, of_x: Tensor | None, axis: int) -> LinearTangents:
        self._check()
        return LinearTangents(x, of_x, self.weight, self.of_weight, self.of_bias, self.dtype, axis)

    def _of_weight(self) -> Tensor | Factored | None:
        if isinstance(self.of_weight, Deferred):
            factored = self.of_weight.factored()
            return self.of_weight.computed() if factored is None else factored
        return self.of_weight

    def _check(self) -> None:
        if self.weight._version != self._version:
            raise RuntimeError(
                "The weights of a layer should stay as they are until its output is used. Found "
                f"weights {list(self.weight.shape)} that were written into in between. Try to "
                "write after the loss is computed, or into a copy."
            )


def tangents_that_wait(out: Tensor, x: Any, weight: Any, bias: Any) -> LinearTangents | None:
    """The tangents of `F.linear`, if it pays to multiply them later.

    Args:
        out: The result ``[*lead, V]``.
        x: The input, dual or not, ``[*lead, D]``.
        weight: ``[V, D]``, dual or not.
        bias: ``[V]``, dual or not, or ``None``.
    """
    if not _pays(out, primal(x), primal(weight), primal(bias)):
        return None
    source = next(d for d in (x, weight, bias) if type(d) is DualTensor)
    dtype = source.carried_type or out.dtype
    of_x = x.tangents if type(x) is DualTensor else None
    of_weight = _held(weight) if type(weight) is DualTensor else None
    of_bias = expanded(bias) if type(bias) is DualTensor else None
    for t in (of_x, of_weight, of_bias):
        if t is not None and not _can_wait(t, dtype):
            return None
    # The input may be written into before the output is used. It is small beside the output.
    copy = primal(x).detach().clone()
    return LinearTangents(
        copy, of_x, primal(weight).detach(), of_weight, of_bias, dtype, copy.ndim - 1
    )


def _pays(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        out.numel() >= FEWEST_THAT_WAIT
        and weight.ndim == 2
        and len(weight) >= _WIDER * weight.shape[1]
        and x.ndim > 1
        and (bias is None or bias.ndim == 1)
        and x.dtype is weight.dtype is out.dtype
        and not weight.is_inference()
        and not torch.is_autocast_enabled(out.device.type)
        and not tracing()
        and not any(is_functorch_wrapped_tensor(t) for t in (out, x, weight))
    )


def _can_wait(t: Tensor | Deferred, dtype: torch.dtype) -> bool:
    if t.dtype is not dtype:
        return False
    return isinstance(t, Deferred) or (len(t) > 0 and not is_functorch_wrapped_tensor(t))


def linear_tangents(x: DualTensor) -> LinearTangents | None:
    """The tangents of `x`, where they are those of a linear layer and wait."""
    return x.held(LinearTangents)


def _held(weight: DualTensor) -> Tensor | Deferred:
    """The tangents of weights, drawn again at every use where they are so."""
    if (factored := weight.factored) is not None:
        return factored
    drawn = weight.held(Drawn)
    return expanded(weight) if drawn is None else drawn


def _leaves_last(items: tuple[Any, ...], ndim: int) -> bool:
    """Whether an index leaves the last of so many axes as it is."""
    if any(isinstance(item, bool) for item in items) or not items:
        return False
    taken = 0
    for item in items:
        if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
            taken += item.ndim
        else:
            taken += item is not None and item is not Ellipsis
    if items[-1] is Ellipsis:
        return taken < ndim
    is_whole = isinstance(items[-1], slice) and items[-1] == slice(None)
    if any(item is Ellipsis for item in items):
        return is_whole
    return taken < ndim or is_whole


def _with_rows(through: Tensor | None, x: Tensor, t: Tensor | None) -> Tensor | None:
    """``through + x W'^T``, added in place if both have the same number of rows."""
    if t is None:
        return through
    if through is None or len(through) != len(t) or not through.is_contiguous():
        return add(through, by_rows(x, t))
    rows = x.to(t.dtype).reshape(1, -1, x.shape[-1]).expand(len(t), -1, -1)
    through.view(len(t), -1, through.shape[-1]).baddbmm_(rows, t.mT)
    return through


def _inner(t: Tensor, vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The inner products ``[K, n]`` of ``[K, n, D]`` and ``[n, D]``, in a type."""
    dtype = torch.promote_types(t.dtype, dtype)
    products = t.to(dtype).transpose(0, 1) @ vectors.to(dtype).unsqueeze(-1)
    return products.squeeze(-1).mT


def _along_rows(t: Tensor, x: Tensor, gradients: Tensor) -> Tensor:
    """``<x W'^T, gradients>`` of each row, ``[k, n]``, for tangents ``[k, V, D]``."""
    dtype = torch.promote_types(gradients.dtype, t.dtype)
    rounded, x = gradients.to(t.dtype), x.to(dtype)
    return torch.stack([(rounded @ row).to(dtype).mul_(x).sum(-1) for row in t])


def _along_factors(factors: Factors, x: Tensor, gradients: Tensor) -> Tensor:
    """The same of factors: [n, V] x [V, k rank] beside [n, D] x [D, k rank]."""
    count, _, rank = factors.left.shape
    left = gradients.to(factors.dtype) @ factors.left.movedim(1, 0).flatten(1)
    right = x.to(factors.dtype) @ factors.right.flatten(0, 1).mT
    dtype = torch.promote_types(gradients.dtype, factors.dtype)
    products = left.to(dtype) * right.to(dtype)
    return products.reshape(-1, count, rank).sum(-1).mT
