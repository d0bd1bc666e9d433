"""Convolutions: K·B images in one call, or K times the filters for tangents of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import add, each_sample, primal, tangents, through_matrix
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._factors import Factors
from multitangent.dual._registry import register_rule

Convolve = Callable[..., Tensor]  # of input, filters, and groups, by default the function's own


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
        def convolve(x: Tensor, filters: Tensor, groups: int = groups) -> Tensor:
            return function(x, filters, None, stride, padding, dilation, groups)

        return add(
            each_sample(input, lambda t: convolve(t, primal(weight).to(t.dtype)), spatial + 1),
            _of_weight(convolve, primal(input), weight, groups),
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
        def convolve(x: Tensor, filters: Tensor, groups: int = groups) -> Tensor:
            return function(x, filters, None, stride, padding, output_padding, groups, dilation)

        return add(
            each_sample(input, lambda t: convolve(t, primal(weight).to(t.dtype)), spatial + 1),
            _of_transposed_weight(convolve, primal(input), weight, groups),
            _of_bias(bias, out.ndim, spatial),
        )


def _of_weight(convolve: Convolve, x: Tensor, weight: Any, groups: int) -> Tensor | None:
    if type(weight) is not DualTensor:
        return None
    return through_matrix(
        weight,
        lambda t: _by_filters(convolve, x, t, groups, 0),
        lambda factors: _by_factors(convolve, x, factors, groups),
    )


def _of_transposed_weight(convolve: Convolve, x: Tensor, weight: Any, groups: int) -> Tensor | None:
    if type(weight) is not DualTensor:
        return None
    return through_matrix(
        weight,
        lambda t: _by_filters(convolve, x, t, groups, 1),
        lambda factors: _by_transposed_factors(convolve, x, factors, groups),
    )


def _by_filters(convolve: Convolve, x: Tensor, t: Tensor, groups: int, outputs: int) -> Tensor:
    """One convolution with K times the filters; `outputs` is their axis of output channels."""
    # [K, out, in / groups, ...], or [K, in, out / groups, ...]
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


def _by_factors(convolve: Convolve, x: Tensor, factors: Factors, groups: int) -> Tensor:
    """Convolved into K rank channels for every group, which are then mixed into the outputs."""
    (count, rank), outputs = factors.right.shape[:2], factors.left.shape[1]
    filters = factors.right.flatten(0, 1)
    filters = filters.expand(groups, *filters.shape).flatten(0, 1)
    inner = convolve(x.to(filters.dtype), filters)
    lead = inner.shape[: inner.ndim - filters.ndim + 1]  # the batch, if there is one
    spatial = inner.shape[len(lead) + 1 :]
    left = factors.left.reshape(count, 1, groups, outputs // groups, rank)
    inner = inner.reshape(lead.numel(), groups, count, rank, spatial.numel())
    return (left @ inner.movedim(2, 0)).reshape(count, *lead, outputs, *spatial)


def _by_transposed_factors(convolve: Convolve, x: Tensor, factors: Factors, groups: int) -> Tensor:
    """Mixed into K rank channels for every group, which are then convolved."""
    (count, inputs, rank), kernel = factors.left.shape, factors.right.shape[2:]
    lead = x.shape[: x.ndim - len(kernel)]  # the batch, if there is one
    spatial = x.shape[len(lead) + 1 :]
    apart = x.to(factors.dtype).reshape(lead.numel(), groups, inputs // groups, spatial.numel())
    left = factors.left.reshape(count, groups, inputs // groups, rank)
    inner = torch.einsum("bgip,kgir->bkgrp", apart, left)
    filters = factors.right.unsqueeze(1).expand(-1, groups, *[-1] * (len(kernel) + 1))
    result = convolve(
        inner.reshape(*lead, count * groups * rank, *spatial), filters.flatten(0, 2), count * groups
    )
    channels = result.shape[len(lead)] // count
    return result.reshape(*lead, count, channels, *result.shape[len(lead) + 1 :]).movedim(
        len(lead), 0
    )


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
