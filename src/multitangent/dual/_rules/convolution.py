"""Convolutions: K·B images in one call, or K times the filters for tangents of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import add, each_sample, full_tangents, primal, tangents
from multitangent.dual._registry import register_rule


def _register(function: Callable[..., Tensor], spatial: int) -> None:
    @register_rule(function)
    def _convolution(
        out: Tensor,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        def convolve(x: Tensor, filters: Tensor) -> Tensor:
            return function(x, filters, None, stride, padding, dilation, groups)

        return add(
            each_sample(input, lambda t: convolve(t, primal(weight).to(t.dtype)), spatial + 1),
            _of_weight(convolve, primal(input), weight, groups, 0),
            _of_bias(bias, out.ndim, spatial),
        )


def _register_transposed(function: Callable[..., Tensor], spatial: int) -> None:
    @register_rule(function)
    def _transposed_convolution(
        out: Tensor,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        def convolve(x: Tensor, filters: Tensor) -> Tensor:
            return function(x, filters, None, stride, padding, output_padding, groups, dilation)

        return add(
            each_sample(input, lambda t: convolve(t, primal(weight).to(t.dtype)), spatial + 1),
            _of_weight(convolve, primal(input), weight, groups, 1),
            _of_bias(bias, out.ndim, spatial),
        )


def _of_weight(
    convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Any, groups: int, outputs: int
) -> Tensor | None:
    """One convolution with K times the filters; `outputs` is their axis of output channels."""
    t = full_tangents(weight)  # [K, out, in / groups, ...], or [K, in, out / groups, ...]
    if t is None:
        return None
    count, shape = t.shape[0], t.shape[2:]
    if count == 0:
        return t.new_zeros(0, *[1] * x.ndim)
    if outputs == 0:  # channels stand group by group, so the K of a group stand together
        apart = t.reshape(count, groups, -1, *shape).transpose(0, 1)
        filters = apart.reshape(-1, *shape)
    else:
        filters = t.transpose(0, 1).flatten(1, 2)
    result = convolve(x.to(filters.dtype), filters)
    lead = result.shape[: result.ndim - len(shape)]  # the batch, if there is one
    spatial = result.shape[len(lead) + 1 :]
    grouped = result.reshape(*lead, groups, count, -1, *spatial)
    axis = len(lead) + 1
    return grouped.movedim(axis, 0).flatten(axis, axis + 1)


def _of_bias(bias: Any, ndim: int, spatial: int) -> Tensor | None:
    t = tangents(bias)  # [K, C]
    if t is None:
        return None
    return t.reshape(len(t), *[1] * (ndim - spatial - 1), t.shape[1], *[1] * spatial)


_register(torch.conv1d, 1)
_register(torch.conv2d, 2)
_register(torch.conv3d, 3)
_register_transposed(torch.conv_transpose1d, 1)
_register_transposed(torch.conv_transpose2d, 2)
_register_transposed(torch.conv_transpose3d, 3)
