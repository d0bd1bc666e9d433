"""Indexing, writing by index, and choosing by a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, full_tangents, tangents, through_matrix
from multitangent.dual._deferred import Deferred
from multitangent.dual._dispatch import copy_from, set_item
from multitangent.dual._dual_tensor import pad_rows
from multitangent.dual._factors import Factors
from multitangent.dual._linear_tangents import linear_tangents
from multitangent.dual._registry import register_rule, register_views
from multitangent.dual._rules.scattering import refuse_frequencies


def _items(index: Any) -> tuple[Any, ...] | None:
    """The parts of an index, arrays and lists as tensors; ``None`` if it moves axes."""
    parts = index if isinstance(index, tuple) else (index,)
    if isinstance(index, list) and not all(isinstance(item, int) for item in index):
        return None  # PyTorch may take it for a tuple
    items = tuple(item if _is_simple(item) else torch.as_tensor(item) for item in parts)
    # Where advanced indices stand apart, PyTorch puts their axes first of all.
    places = [place for place, item in enumerate(items) if _is_advanced(item)]
    return None if places and places[-1] - places[0] >= len(places) else items


def _is_advanced(item: Any) -> bool:
    return isinstance(item, bool) or (isinstance(item, Tensor) and item.ndim > 0)


def _is_simple(item: Any) -> bool:
    return item is None or item is Ellipsis or isinstance(item, (slice, int, Tensor))


def _places(x: Tensor, index: Any) -> Tensor:
    """Where an index leads in a flattened tensor: right for every kind of index."""
    return torch.arange(x.numel(), device=x.device).reshape(x.shape)[index]


@register_rule(Tensor.__getitem__)
def _get_item(out: Tensor, x: Any, index: Any) -> Tensor | Deferred:
    items = _items(index)
    if items is not None and (waiting := linear_tangents(x)) is not None:
        chosen = waiting.indexed(items)
        if chosen is not None:
            return chosen
    if items is None:
        t: Tensor = full(x).flatten(1)[:, _places(x.primal, index)]
    else:
        cut = _cut_axes(items, x.primal.ndim)
        t = (full(x, *cut) if cut else x.tangents)[(slice(None), *items)]
    return t


def _cut_axes(items: tuple[Any, ...], ndim: int) -> list[int]:
    """The axes of which an index takes some only, all others stay as they are."""
    if any(isinstance(item, (Tensor, bool)) for item in items):
        whole_first = isinstance(items[0], slice) and items[0] == slice(None)
        return list(range(1 if whole_first else 0, ndim))
    missing = ndim - sum(item is not None and item is not Ellipsis for item in items)
    axes, axis = [], 0
    for item in items:
        if item is Ellipsis:
            axis += missing
        elif item is not None:
            if not (isinstance(item, slice) and item == slice(None)):
                axes.append(axis)
            axis += 1
    return axes


register_views(Tensor.__getitem__)


@register_rule(torch.fill)
def _fill(out: Tensor, input: Any, value: Any) -> Tensor:
    return _copy_from(out, input, value)


@register_rule(copy_from)
def _copy_from(out: Tensor, x: Any, other: Any, non_blocking: bool = False) -> Tensor:
    t = tangents(other, out.ndim)
    return out.new_zeros(0, *[1] * out.ndim) if t is None else t.to(out.device)


@register_rule(set_item)
def _set_item(out: Tensor, x: Any, index: Any, value: Any) -> Tensor:
    written, source = _both(out, x, value)
    items = _items(index)
    if items is None:
        place: Any = (slice(None), _places(out, index))
        target = written.flatten(1)
    else:
        place, target = (slice(None), *items), written
    slot_ndim = target[place].ndim
    while source.ndim > slot_ndim:  # PyTorch drops axes of size 1 at the front
        source = source.squeeze(1)
    shape = [1] * (slot_ndim - source.ndim)
    target[place] = source.reshape(len(source), *shape, *source.shape[1:])
    return target.reshape(written.shape)


def _both(out: Tensor, x: Any, source: Any) -> tuple[Tensor, Tensor]:
    """Tangents of a target, to be written into, and of what is written, with as many rows."""
    target, written = full_tangents(x), full_tangents(source)
    known = [t for t in (target, written) if t is not None]
    count = max(map(len, known))
    if target is None:
        target = known[0].new_zeros(count, *out.shape)
    else:
        target = pad_rows(target, count).clone(memory_format=torch.contiguous_format)
    if written is None:
        shape = source.shape if isinstance(source, Tensor) else ()
        written = target.new_zeros(1, *[1] * len(shape)).expand(count, *shape)
    return target, pad_rows(written, count).to(target.dtype)


@register_rule(torch.index_add, Tensor.index_add)
def _index_add(
    out: Tensor, input: Any, dim: int, index: Tensor, source: Any, *, alpha: float = 1
) -> Tensor:
    target, written, axis = _along(out, input, dim, source)
    added = target.index_add(axis, index.reshape(-1), written, alpha=alpha)
    return added.reshape(len(target), *out.shape)


@register_rule(torch.index_copy, Tensor.index_copy)
def _index_copy(out: Tensor, input: Any, dim: int, index: Tensor, source: Any) -> Tensor:
    target, written, axis = _along(out, input, dim, source)
    copied = target.index_copy(axis, index.reshape(-1), written)
    return copied.reshape(len(target), *out.shape)


@register_rule(torch.scatter_add, Tensor.scatter_add)
def _scatter_add(out: Tensor, input: Any, dim: int, index: Tensor, src: Any) -> Tensor:
    return _scattered(Tensor.scatter_add, out, input, dim, index, src)


@register_rule(torch.scatter, Tensor.scatter)
def _scatter(
    out: Tensor, input: Any, dim: int, index: Tensor, src: Any = None, *, value: Any = None
) -> Tensor:
    return _scattered(Tensor.scatter, out, input, dim, index, value if src is None else src)


def _scattered(
    function: Callable[..., Tensor], out: Tensor, input: Any, dim: int, index: Tensor, src: Any
) -> Tensor:
    target, written, axis = _along(out, input, dim, src)
    index = index if index.ndim else index.reshape(1)
    written = written if isinstance(src, Tensor) else written.expand(-1, *index.shape)
    index = index.expand(len(target), *index.shape)
    return function(target, axis, index, written).reshape(len(target), *out.shape)


def _along(out: Tensor, input: Any, dim: int, source: Any) -> tuple[Tensor, Tensor, int]:
    """Tangents of a target and of what is written along an axis, and that axis of the tangents.

    A tensor without axes counts as one of a single entry.
    """
    target, written = _both(out, input, source)
    if out.ndim == 0:
        target = target.unsqueeze(1)
    missing = target.ndim - written.ndim
    return target, written.reshape(*written.shape, *[1] * missing), dim % (target.ndim - 1) + 1


@register_rule(torch.index_fill, Tensor.index_fill)
def _index_fill(out: Tensor, input: Any, dim: int, index: Tensor, value: Any) -> Tensor:
    target, written, axis = _along(out, input, dim, value)
    shape = list(target.shape)
    shape[axis] = index.numel()
    filled = target.index_copy(axis, index.reshape(-1), written.expand(shape))
    return filled.reshape(len(target), *out.shape)


@register_rule(torch.where)
def _where(out: Tensor, condition: Tensor, input: Any, other: Any) -> Tensor:
    # Chosen, not multiplied by the condition: the other side may be infinite.
    zero = out.new_zeros(())
    chosen, rest = tangents(input, out.ndim), tangents(other, out.ndim)
    return add(
        None if chosen is None else torch.where(condition, chosen, zero),
        None if rest is None else torch.where(condition, zero, rest),
    )


@register_rule(Tensor.where)
def _where_method(out: Tensor, input: Any, condition: Tensor, other: Any) -> Tensor:
    return _where(out, condition, input, other)


@register_rule(torch.masked_fill, Tensor.masked_fill)
def _masked_fill(out: Tensor, input: Any, mask: Tensor, value: Any) -> Tensor:
    return _where(out, mask, value, input)


@register_rule(F.embedding)
def _embedding(
    out: Tensor,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    refuse_frequencies(scale_grad_by_freq, weight)

    def chosen(table: Tensor) -> Tensor:
        if padding_idx is not None:  # whose row is never trained
            row = torch.tensor(padding_idx % table.shape[1], device=table.device)
            table = table.index_fill(1, row, 0.0)
        return table[:, input]

    def of_factors(factors: Factors) -> Tensor:
        left, right = chosen(factors.left), factors.right  # [K, *input, rank], [K, rank, n]
        product = torch.bmm(left.reshape(len(left), input.numel(), right.shape[1]), right)
        return product.reshape(*left.shape[:-1], right.shape[-1])

    return through_matrix(weight, chosen, of_factors)


@register_rule(torch.index_select, Tensor.index_select)
def _index_select(out: Tensor, input: Any, dim: int, index: Tensor) -> Tensor:
    if input.primal.ndim == 0:
        return full(input)
    return full(input, dim).index_select(dim % input.primal.ndim + 1, index)


@register_rule(torch.gather, Tensor.gather)
def _gather(out: Tensor, input: Any, dim: int, index: Tensor) -> Tensor:
    t = full(input)
    if input.primal.ndim == 0:
        return t.reshape(-1, *[1] * index.ndim).expand(-1, *index.shape)
    return t.gather(dim % input.primal.ndim + 1, index.expand(t.shape[0], *index.shape))
