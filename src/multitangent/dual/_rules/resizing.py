"""Padding and interpolation: linear in the tensor that is resized."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import each_sample, full
from multitangent.dual._registry import register_rule


@register_rule(F.pad)
def _pad(
    out: Tensor, input: Any, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor | None:
    if mode == "constant":
        padded = range(-(len(pad) // 2), 0)
        return F.pad(full(input, *padded), pad)
    spatial = len(pad) // 2
    return each_sample(input, lambda t: F.pad(t, pad, mode), spatial + 1)


@register_rule(F.interpolate)
def _interpolate(out: Tensor, input: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    return each_sample(input, lambda t: F.interpolate(t, *args, **kwargs), input.primal.ndim - 1)


@register_rule(torch.pixel_shuffle, torch.pixel_unshuffle)
def _shuffle(out: Tensor, input: Any, factor: int) -> Tensor | None:
    if input.tangents.shape[0] == 0:  # which PyTorch returns as they are
        return out.new_zeros(0, *out.shape)
    function = (
        torch.pixel_shuffle if out.shape[-1] > input.primal.shape[-1] else torch.pixel_unshuffle
    )
    return function(full(input, -1, -2, -3), factor)
