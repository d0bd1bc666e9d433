"""Pooling: the mean of tangents, or the tangent of the largest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import each_sample, full
from multitangent.dual._registry import register_composite, register_rule


def _register_average(function: Callable[..., Tensor], spatial: int) -> None:
    @register_rule(function)
    def _average(out: Tensor, input: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        return each_sample(input, lambda t: function(t, *args, **kwargs), spatial + 1)


def _register_max(
    with_indices: Callable[..., tuple[Tensor, Tensor]], spatial: int, *functions: Any
) -> None:
    """Register functions whose outputs are values, or values and indices."""

    @register_rule(*functions, with_indices)
    def _largest(
        out: Any, input: Any, *args: Any, return_indices: bool = False, **kwargs: Any
    ) -> Any:
        if isinstance(out, Tensor):
            places = with_indices(input.primal, *args, **kwargs)[1]
        else:
            places = out[1]
        t = full(input).flatten(-spatial)
        chosen = t.gather(-1, places.flatten(-spatial).expand(*t.shape[:-1], -1))
        result = chosen.reshape(*t.shape[:-1], *places.shape[-spatial:])
        return result if isinstance(out, Tensor) else (result, None)


for _spatial, _functions in enumerate(
    [
        (torch.avg_pool1d, torch.adaptive_avg_pool1d),
        (F.avg_pool2d, F.adaptive_avg_pool2d),
        (F.avg_pool3d, F.adaptive_avg_pool3d),
    ],
    start=1,
):
    for _function in _functions:
        _register_average(_function, _spatial)

_register_max(F.max_pool1d_with_indices, 1, F.max_pool1d, torch.max_pool1d)
_register_max(F.max_pool2d_with_indices, 2, F.max_pool2d, torch.max_pool2d)
_register_max(F.max_pool3d_with_indices, 3, F.max_pool3d, torch.max_pool3d)
_register_max(F.adaptive_max_pool1d_with_indices, 1, F.adaptive_max_pool1d)
_register_max(F.adaptive_max_pool2d_with_indices, 2, F.adaptive_max_pool2d)
_register_max(F.adaptive_max_pool3d_with_indices, 3, F.adaptive_max_pool3d)


def _register_power(function: Callable[..., Tensor], average: Any, spatial: int) -> None:
    @register_composite(function)
    def _power_average(
        input: Tensor,
        norm_type: float,
        kernel_size: Any,
        stride: Any = None,
        ceil_mode: bool = False,
    ) -> Tensor:
        """The p-th root of the sum of p-th powers."""
        count = kernel_size**spatial if isinstance(kernel_size, int) else math.prod(kernel_size)
        mean = average(input.pow(norm_type), kernel_size, stride, 0, ceil_mode)
        return (torch.sign(mean) * torch.relu(torch.abs(mean)) * count).pow(1.0 / norm_type)


_register_power(F.lp_pool1d, F.avg_pool1d, 1)
_register_power(F.lp_pool2d, F.avg_pool2d, 2)
_register_power(F.lp_pool3d, F.avg_pool3d, 3)
