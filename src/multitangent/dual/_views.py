"""Dual tensors that look into the memory of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from multitangent.dual._deferred import Deferred
from multitangent.dual._dual_tensor import DualTensor, make_dual
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


def make_result(primal: Tensor, tangents: Tensor | Deferred, source: Any) -> DualTensor:
    """A function's result: its first argument, memory shared with that, or a tensor of its own."""
    if type(source) is DualTensor and primal is source._primal:
        return source
    if not isinstance(tangents, Tensor):
        return make_dual(primal, tangents)
    if type(source) is DualTensor and primal._is_view() and shares_memory(primal, source._primal):
        return make_view(primal, tangents, source, None)
    return make_dual(primal, tangents)


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are views of one memory."""
    return _storage(x) == _storage(y)


def _storage(x: Tensor) -> int:
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.untyped_storage().data_ptr()


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
