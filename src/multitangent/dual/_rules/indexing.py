"""Indexing, writing by index, and choosing by a condition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, full_tangents, tangents
from multitangent.dual._dispatch import copy_from, set_item
from multitangent.dual._dual_tensor import DualTensor, pad_rows
from multitangent.dual._fallback import jvp_by_vmap
from multitangent.dual._registry import register_rule, register_views
from multitangent.dual._rules.scattering import refuse_frequencies


def _is_advanced(index: Any) -> bool:
    return isinstance(index, (list, bool)) or (isinstance(index, Tensor) and index.ndim > 0)


def _moves_axes(index: tuple[Any, ...]) -> bool:
    """Whether advanced indices stand apart, so that PyTorch puts their axes first of all."""
    places = [place for place, item in enumerate(index) if _is_advanced(item)]
    return bool(places) and places[-1] - places[0] >= len(places)


@register_rule(Tensor.__getitem__)
def _get_item(out: Tensor, x: Any, index: Any) -> Tensor:
    items = index if isinstance(index, tuple) else (index,)
    items = tuple(item if _is_simple(item) else torch.as_tensor(item) for item in items)
    if _moves_axes(items):
        return jvp_by_vmap(Tensor.__getitem__, (x, index), {}, x.tangents.shape[0])[0]
    cut = _cut_axes(items, x.primal.ndim)
    t: Any = full(x, *cut) if cut else x.tangents
    result: Tensor = t[(slice(None), *items)]
    return result


def _is_simple(item: Any) -> bool:
    return item is None or item is Ellipsis or isinstance(item, (slice, int, Tensor))


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
def _fill(out: Tensor, x: Any, value: Any) -> Tensor:
    return _copy_from(out, x, value)


@register_rule(copy_from)
def _copy_from(out: Tensor, x: Any, source: Any, non_blocking: bool = False) -> Tensor:
    t = tangents(source, out.ndim)
    return out.new_zeros(0, *[1] * out.ndim) if t is None else t.to(out.device)


@register_rule(set_item)
def _set_item(out: Tensor, x: Any, index: Any, value: Any) -> Tensor:
    items = index if isinstance(index, tuple) else (index,)
    rows = [d.tangents.shape[0] for d in (x, value) if type(d) is DualTensor]
    count = max(rows)
    if _moves_axes(items):
        return jvp_by_vmap(set_item, (x, index, value), {}, count)[0]
    target, source = full_tangents(x), full_tangents(value)
    written = (
        out.new_zeros(count, *out.shape) if target is None else pad_rows(target, count).clone()
    )
    place = (slice(None), *items)
    if source is None:
        written[place] = 0
        return written
    slot_ndim = written[place].ndim
    source = pad_rows(source, count)
    written[place] = source.reshape(count, *[1] * (slot_ndim - source.ndim), *source.shape[1:])
    return written


@register_rule(torch.where)
def _where(out: Tensor, condition: Tensor, x: Any, y: Any) -> Tensor:
    # Chosen, not multiplied by the condition: the other side may be infinite.
    zero = out.new_zeros(())
    chosen, other = tangents(x, out.ndim), tangents(y, out.ndim)
    return add(
        None if chosen is None else torch.where(condition, chosen, zero),
        None if other is None else torch.where(condition, zero, other),
    )


@register_rule(Tensor.where)
def _where_method(out: Tensor, x: Any, condition: Tensor, y: Any) -> Tensor:
    return _where(out, condition, x, y)


@register_rule(torch.masked_fill, Tensor.masked_fill)
def _masked_fill(out: Tensor, x: Any, mask: Tensor, value: Any) -> Tensor:
    return _where(out, mask, value, x)


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
    t = full(weight)
    if padding_idx is not None:  # whose row is never trained
        t = t.index_fill(1, torch.tensor(padding_idx % t.shape[1], device=t.device), 0.0)
    return t[:, input]


@register_rule(torch.index_select, Tensor.index_select)
def _index_select(out: Tensor, input: Any, dim: int, index: Tensor) -> Tensor:
    return full(input, dim).index_select(dim % input.primal.ndim + 1, index)


@register_rule(torch.gather, Tensor.gather)
def _gather(out: Tensor, input: Any, dim: int, index: Tensor) -> Tensor:
    t = full(input)
    return t.gather(dim % input.primal.ndim + 1, index.expand(t.shape[0], *index.shape))
