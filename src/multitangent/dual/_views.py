"""Dual tensors that look into the memory of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._arguments import find_duals, map_duals
from multitangent.dual._deferred import Deferred
from multitangent.dual._dual_tensor import DualTensor, make_dual, shares_memory
from multitangent.dual._registry import Rule


def make_view(
    primal: Tensor,
    tangents: Tensor,
    parent: DualTensor,
    replay: Callable[[Tensor], Tensor] | None,
) -> DualTensor:
    """A dual tensor that looks into the memory of `parent`; `replay` takes the view again."""
    view = make_dual(primal, tangents)
    view._parent, view._replay = parent, replay
    view._writes, view._seen = parent._writes, parent._writes[0]
    return view


# A function with its arguments, and which of its results is meant, if there are several.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None]


def make_result(primal: Tensor, tangents: Tensor | Deferred, call: Call) -> DualTensor:
    """A function's result: its first argument, memory shared with one, or a tensor of its own."""
    _, args, kwargs, _ = call
    source = args[0] if args else None
    if type(source) is DualTensor and primal is source._primal:
        return source
    if isinstance(tangents, Tensor) and primal._is_view():
        for parent in find_duals((args, kwargs)):
            if shares_memory(primal, parent._primal):
                return make_view(primal, tangents, parent, _called_again(call, parent))
    return make_dual(primal, tangents)


def _called_again(call: Call, parent: DualTensor) -> Callable[[Tensor], Tensor]:
    """How to take a view of tangents by a function that has no rule."""
    function, args, kwargs, item = call

    def view(row: Tensor) -> Tensor:
        new_args, new_kwargs = map_duals(
            lambda dual: row if dual is parent else dual.primal, (args, kwargs)
        )
        result = function(*new_args, **new_kwargs)
        chosen: Tensor = result if item is None else result[item]
        return chosen

    def replay(full: Tensor) -> Tensor:
        if len(full) == 0:
            return full.new_zeros(0, *view(parent.primal).shape)
        with torch.no_grad():
            return torch.func.vmap(view)(full)

    return replay


def views_of(
    out: Any, tangents: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of a function that returns views of its first argument, a dual tensor."""
    parent, *rest = args

    def view(item: Tensor, tangent: Tensor, index: int | None) -> Any:
        if item is parent.primal:
            return parent
        if not shares_memory(item, parent.primal):
            return make_dual(item, tangent)  # a copy, as `reshape` may have to make

        def replay(full: Tensor) -> Tensor:
            with torch.no_grad():
                result = rule(out, make_dual(parent.primal, full), *rest, **kwargs)
            tangents: Tensor = result if index is None else result[index]
            return tangents

        return make_view(item, tangent, parent, replay)

    if isinstance(out, Tensor):
        return view(out, tangents, None)
    return tuple(view(o, t, i) for i, (o, t) in enumerate(zip(out, tangents, strict=True)))
