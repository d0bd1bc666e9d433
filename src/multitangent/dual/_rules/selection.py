"""Functions that choose among numbers: their tangents are those of the chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import full
from multitangent.dual._registry import register_rule
from multitangent.dual._rules.local import elementwise, named_axes, to_one_number


def _selected(
    func: Callable[..., Any], place: int, out: Any, x: Any, *args: Any, **kwargs: Any
) -> Any:
    """Values and indices along an axis, or the value of one or two tensors."""
    if isinstance(out, Tensor):
        arguments = (x, *args)
        if out.ndim == 0:
            return to_one_number(func, arguments, kwargs)
        return elementwise(func, out, *arguments, **kwargs)
    dim = named_axes(place, args, kwargs, -1)
    indices = out[1]
    if indices.ndim == 0 or x.primal.ndim == 0:
        t = full(x)
        return (t.index_select(1, indices.reshape(1)).squeeze(1) if t.ndim > 1 else t), None
    axis = dim % x.primal.ndim
    keepdim = indices.ndim == x.primal.ndim
    places = indices if keepdim else indices.unsqueeze(axis)
    t = full(x)
    chosen = t.gather(axis + 1, places.expand(len(t), *places.shape))
    return (chosen if keepdim else chosen.squeeze(axis + 1)), None


for _place, _names in enumerate(
    ["max min median nanmedian mode sort cummax cummin", "topk kthvalue"]
):
    for _name in _names.split():
        for _function in (getattr(torch, _name), getattr(Tensor, _name)):
            register_rule(_function)(partial(_selected, _function, _place))
