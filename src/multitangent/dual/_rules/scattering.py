"""Reductions of groups: of what an index gathers, of segments, of bags of embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, full_tangents, primal
from multitangent.dual._backward import slopes
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._registry import register_rule


@register_rule(torch.scatter_reduce, Tensor.scatter_reduce)
def _scatter_reduce(
    out: Tensor,
    x: Any,
    dim: int,
    index: Tensor,
    src: Any,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    of_self, of_source = _slopes_of_groups(
        torch.scatter_reduce, x, (dim, index), src, reduce, include_self
    )
    if of_source is not None and out.ndim:
        into = of_source.new_zeros(len(of_source), *out.shape)
        of_source = into.scatter_add(dim % out.ndim + 1, index.expand(of_source.shape), of_source)
    return add(of_self, of_source)


@register_rule(torch.index_reduce, Tensor.index_reduce)
def _index_reduce(
    out: Tensor,
    x: Any,
    dim: int,
    index: Tensor,
    source: Any,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    of_self, of_source = _slopes_of_groups(
        torch.index_reduce, x, (dim, index), source, reduce, include_self
    )
    if of_source is not None and out.ndim:
        into = of_source.new_zeros(len(of_source), *out.shape)
        of_source = into.index_add(dim % out.ndim + 1, index, of_source)
    return add(of_self, of_source)


def _slopes_of_groups(
    func: Any, x: Any, place: tuple[Any, ...], source: Any, reduce: str, include_self: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The tangents of both arguments, each number times the slope of the group it belongs to."""
    args = (x, *place, source, reduce)
    found = iter(slopes(func, args, {"include_self": include_self}))
    of_self = full(x) * next(found) if type(x) is DualTensor else None
    return of_self, full(source) * next(found) if type(source) is DualTensor else None


@register_rule(torch.segment_reduce)
def _segment_reduce(out: Tensor, data: Any, reduce: str, *, axis: int = 0, **kwargs: Any) -> Tensor:
    slope = slopes(torch.segment_reduce, (data, reduce), {"axis": axis, **kwargs})[0]
    t = (full(data) * slope).movedim(0, -1)
    kwargs = {**kwargs, "initial": 0}
    return torch.segment_reduce(t.contiguous(), "sum", axis=axis, **kwargs).movedim(-1, 0)


@register_rule(F.embedding_bag)
def _embedding_bag(
    out: Tensor,
    input: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    refuse_frequencies(scale_grad_by_freq, weight)
    bags: dict[str, Any] = {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
    t = full_tangents(weight)
    if mode == "max":
        assert t is not None
        return _largest_of_bags(input, primal(weight), t, offsets, bags)
    through = None
    if t is not None:  # linear: the tangents of one embedding as one longer embedding
        rows = t.movedim(0, 1).flatten(1)
        weights = primal(per_sample_weights)
        weights = None if weights is None else weights.to(rows.dtype)
        summed = F.embedding_bag(
            input, rows, offsets, mode=mode, per_sample_weights=weights, **bags
        )
        through = summed.reshape(len(summed), len(t), -1).movedim(1, 0)
    if (of_weights := full_tangents(per_sample_weights)) is None:
        return add(through)
    values = primal(weight).to(of_weights.dtype)
    each = [
        F.embedding_bag(input, values, offsets, mode=mode, per_sample_weights=row, **bags)
        for row in of_weights
    ]
    return add(through, torch.stack(each))


def _largest_of_bags(
    input: Tensor, weight: Tensor, t: Tensor, offsets: Tensor | None, bags: dict[str, Any]
) -> Tensor:
    if offsets is None:
        offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
        input = input.flatten()
    _, _, sizes, rows = torch.embedding_bag(
        weight, input, offsets, False, 2, False, None, bags["include_last_offset"],
        bags["padding_idx"],
    )  # fmt: skip
    chosen = t.gather(1, rows.clamp(min=0).expand(len(t), *rows.shape))
    return chosen * (sizes > 0).reshape(-1, 1)


def refuse_frequencies(scale_grad_by_freq: bool, weight: Any) -> None:
    """Raise where backpropagation would divide a gradient by how often its row is used."""
    if scale_grad_by_freq and type(weight) is DualTensor:
        raise NotImplementedError(
            "`scale_grad_by_freq` of an embedding should be false where its weight carries "
            "tangents: backpropagation then divides a gradient that is no derivative. Found true. "
            "Try `perturb='activations'`, where the embedding runs backward itself."
        )
