"""Shape operations: the tangents take the same way, one axis further back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import full, full_tangents
from multitangent.dual._deferred import Deferred
from multitangent.dual._dual_tensor import DualTensor, pad_rows
from multitangent.dual._linear_tangents import LinearTangents, linear_tangents
from multitangent.dual._registry import register_rule, register_views


def _reshaped(out: Tensor, x: DualTensor) -> Tensor | LinearTangents:
    """Tangents of a reshaped tensor, shared by the batch for as long as its axis stays."""
    if (waiting := linear_tangents(x)) is not None:
        reshaped = waiting.reshaped(out.shape)
        if reshaped is not None:
            return reshaped
    t, shape = x.tangents, x.primal.shape
    if t.shape[1:] == shape:
        return t.reshape(t.shape[0], *out.shape)
    keeps_batch = shape[:1] == out.shape[:1] and t.shape[2:] == shape[1:] and len(shape) > 0
    if keeps_batch:
        return t.reshape(t.shape[0], 1, *out.shape[1:])
    return t.expand(t.shape[0], *shape).reshape(t.shape[0], *out.shape)


@register_rule(
    torch.reshape,
    Tensor.reshape,
    Tensor.view,
    Tensor.view_as,
    Tensor.reshape_as,
    torch.flatten,
    Tensor.flatten,
    torch.ravel,
    Tensor.ravel,
    torch.unflatten,
    Tensor.unflatten,
)
def _reshape(out: Tensor, x: Any, *args: Any, **kwargs: Any) -> Tensor | LinearTangents:
    if out.dtype != x.primal.dtype:
        raise NotImplementedError(
            f"`view` should keep the type of a tensor that carries tangents. Found {out.dtype}. "
            "Try `to`."
        )
    return _reshaped(out, x)


def _axis(x: DualTensor, dim: int) -> int:
    """An axis of the tangents, from an axis of the primal."""
    return dim % x.primal.ndim + 1


def _flat(items: Sequence[Any]) -> list[int]:
    """Axes or sizes given one by one or as one sequence."""
    return list(items[0] if len(items) == 1 and isinstance(items[0], Sequence) else items)


@register_rule(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(out: Tensor, x: Any, dim: int) -> Tensor:
    t: Tensor = x.tangents.unsqueeze(dim % out.ndim + 1)
    return t


@register_rule(torch.squeeze, Tensor.squeeze)
def _squeeze(out: Tensor, x: Any, dim: Any = None) -> Tensor:
    shape = x.primal.shape
    chosen = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [_axis(x, axis) for axis in chosen if len(shape) and shape[axis] == 1]
    t: Tensor = x.tangents.squeeze(axes)
    return t


@register_rule(
    torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes,
    torch.swapdims, Tensor.swapdims,
)  # fmt: skip
def _transpose(out: Tensor, x: Any, dim0: int, dim1: int) -> Tensor | Deferred:
    if (waiting := linear_tangents(x)) is not None:
        return waiting.transposed(dim0, dim1)
    if out.ndim == 2 and dim0 % 2 != dim1 % 2 and (factored := x.factored) is not None:
        return factored.transposed()
    t: Tensor = x.tangents
    return t if out.ndim == 0 else t.transpose(_axis(x, dim0), _axis(x, dim1))


@register_rule(torch.t, Tensor.t, Tensor.mT.__get__, Tensor.mH.__get__)  # type: ignore[attr-defined]
def _matrix_transpose(out: Tensor, x: Any) -> Tensor | Deferred:
    if (waiting := linear_tangents(x)) is not None:
        return waiting.transposed(-1, -2)
    if out.ndim == 2 and (factored := x.factored) is not None:
        return factored.transposed()
    t: Tensor = x.tangents
    return t if x.primal.ndim < 2 else t.transpose(-1, -2)


@register_rule(Tensor.T.__get__, Tensor.H.__get__)  # type: ignore[attr-defined]
def _reverse_axes(out: Tensor, x: Any) -> Tensor | Deferred:
    if out.ndim == 2 and (factored := x.factored) is not None:
        return factored.transposed()
    t: Tensor = x.tangents
    return t.permute(0, *range(x.primal.ndim, 0, -1))


@register_rule(torch.permute, Tensor.permute)
def _permute(out: Tensor, x: Any, *dims: Any) -> Tensor | Deferred:
    if (waiting := linear_tangents(x)) is not None:
        return waiting.permuted([dim % out.ndim for dim in _flat(dims)])
    t: Tensor = x.tangents.permute(0, *[_axis(x, dim) for dim in _flat(dims)])
    return t


@register_rule(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis)
def _movedim(out: Tensor, x: Any, source: Any, destination: Any) -> Tensor | Deferred:
    moved, to = (
        [dim % max(out.ndim, 1) for dim in ([dims] if isinstance(dims, int) else dims)]
        for dims in (source, destination)
    )
    axes = [axis for axis in range(out.ndim) if axis not in moved]
    for position, axis in sorted(zip(to, moved, strict=True)):
        axes.insert(position, axis)
    return _permute(out, x, axes) if out.ndim else x.tangents


@register_rule(torch.narrow, Tensor.narrow)
def _narrow(out: Tensor, x: Any, dim: int, start: int, length: int) -> Tensor | Deferred:
    if (waiting := linear_tangents(x)) is not None and isinstance(start, int):
        items = (slice(None),) * (dim % x.primal.ndim)
        begin = start % x.primal.shape[dim] if start < 0 else start
        narrowed = waiting.indexed((*items, slice(begin, begin + length)))
        if narrowed is not None:
            return narrowed
    t = full(x, dim)
    return t.narrow(_axis(x, dim), start, length)


@register_rule(torch.select, Tensor.select)
def _select(out: Tensor, x: Any, dim: int, index: int) -> Tensor:
    t = full(x, dim)
    return t.select(_axis(x, dim), index)


@register_rule(Tensor.expand)
def _expand(out: Tensor, x: Any, *sizes: Any) -> Tensor:
    t: Tensor = x.tangents
    return t.reshape(t.shape[0], *[1] * (out.ndim - x.primal.ndim), *t.shape[1:])


@register_rule(Tensor.expand_as)
def _expand_as(out: Tensor, x: Any, other: Tensor) -> Tensor:
    return _expand(out, x)


@register_rule(torch.unbind, Tensor.unbind)
def _unbind(out: Any, x: Any, dim: int = 0) -> Any:
    return full(x, dim).unbind(_axis(x, dim))


@register_rule(torch.chunk, Tensor.chunk)
def _chunk(out: Any, x: Any, chunks: int, dim: int = 0) -> Any:
    sizes = [piece.shape[dim] for piece in out]
    if dim % x.primal.ndim == 0 and (factored := x.factored) is not None:
        starts = accumulate(sizes[:-1], initial=0)
        return [factored.narrow(*place) for place in zip(starts, sizes, strict=True)]
    return torch.split(full(x, dim), sizes, _axis(x, dim))


@register_rule(torch.split, Tensor.split)
def _split(out: Any, x: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    return _chunk(out, x, 0, dim)


@register_rule(torch.clone, Tensor.clone)
def _clone(out: Tensor, x: Any, *, memory_format: Any = None) -> Tensor | Deferred:
    if (waiting := linear_tangents(x)) is not None:
        return waiting
    t: Tensor = x.tangents  # tangents are never written in place, so there is nothing to copy
    return t


@register_rule(Tensor.contiguous)
def _contiguous(out: Tensor, x: Any, memory_format: Any = None) -> Tensor | Deferred:
    if (waiting := linear_tangents(x)) is not None:
        return waiting
    t: Tensor = x.tangents
    return t


@register_rule(
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.double,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
)
def _to(out: Tensor, x: Any, *args: Any, **kwargs: Any) -> Tensor | Deferred | None:
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return None  # the name of a type, or numbers without derivatives
    if out.device == x.primal.device and (waiting := linear_tangents(x)) is not None:
        return waiting.to(out.dtype)
    t: Tensor = x.tangents
    return t.to(out.device, out.dtype)


@register_rule(torch.flip, Tensor.flip)
def _flip(out: Tensor, x: Any, *dims: Any) -> Tensor:
    if out.ndim == 0:
        return full(x)
    t: Tensor = x.tangents.flip([_axis(x, dim) for dim in _flat(dims)])
    return t


@register_rule(torch.roll, Tensor.roll)
def _roll(out: Tensor, x: Any, shifts: Any, dims: Any = None) -> Tensor:
    if out.ndim == 0:
        return full(x)
    if dims is None:
        t = full(x)
        return t.flatten(1).roll(shifts, 1).reshape(t.shape)
    axes = [_axis(x, dim) for dim in ([dims] if isinstance(dims, int) else dims)]
    return full(x, *[axis - 1 for axis in axes]).roll(shifts, axes)


@register_rule(Tensor.repeat)
def _repeat(out: Tensor, x: Any, *sizes: Any) -> Tensor:
    t = full(x)
    t = t.reshape(t.shape[0], *[1] * (out.ndim - x.primal.ndim), *t.shape[1:])
    return t.repeat(1, *_flat(sizes))


def _joined(tensors: Sequence[Any], out: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Tangents of tensors put together, zeros for those that have none."""
    count = max(x.tangents.shape[0] for x in tensors if type(x) is DualTensor)
    parts = []
    for x in tensors:
        t = full_tangents(x)
        parts.append(out.new_zeros(count, *x.shape) if t is None else pad_rows(t, count))
    return join(parts)


@register_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(out: Tensor, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    # PyTorch leaves out empty vectors, with which caches begin, whatever the other shapes are.
    tensors = [x for x in tensors if x.ndim == out.ndim]
    return _joined(tensors, out, lambda parts: torch.cat(parts, dim % out.ndim + 1))


@register_rule(torch.stack)
def _stack(out: Tensor, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    return _joined(tensors, out, lambda parts: torch.stack(parts, dim % out.ndim + 1))


register_views(
    torch.reshape, Tensor.reshape, Tensor.view, Tensor.view_as, Tensor.reshape_as,
    torch.flatten, Tensor.flatten, torch.ravel, Tensor.ravel, torch.unflatten, Tensor.unflatten,
    torch.unsqueeze, Tensor.unsqueeze, torch.squeeze, Tensor.squeeze,
    torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes,
    torch.swapdims, Tensor.swapdims, torch.t, Tensor.t,
    Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__,  # type: ignore[attr-defined]
    torch.permute, Tensor.permute, torch.movedim, Tensor.movedim,
    torch.moveaxis, Tensor.moveaxis, torch.narrow, Tensor.narrow,
    torch.select, Tensor.select, Tensor.expand, Tensor.expand_as, torch.unbind, Tensor.unbind,
    torch.chunk, Tensor.chunk, torch.split, Tensor.split, Tensor.contiguous, Tensor.to,
    Tensor.type, Tensor.type_as, Tensor.double, Tensor.float, Tensor.half, Tensor.bfloat16,
)  # fmt: skip
