"""Functions that switch gradients off: tangents stop where backpropagation does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from multitangent.dual._arguments import find_duals, primals
from multitangent.dual._graph import GRAPH_QUERIES


class ObeyedGradMode(TorchFunctionMode):
    """Inside this block `torch.no_grad()` stops tangents too.

    Gradients are to be enabled when the block begins.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if torch.is_grad_enabled() or func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)
        return constant(func, args, kwargs)


def constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a function returns where gradients are switched off.

    As in backpropagation, a tensor that is written in place keeps the derivatives that it had.
    """
    if func in GRAPH_QUERIES:
        return func(*args)
    out = func(*primals(args), **primals(dict(kwargs)))
    return next((d for d in find_duals((args, dict(kwargs))) if d.primal is out), _apart(out))


def _apart(out: Any) -> Any:
    """Views, as tensors of their own that share the memory: their base is known to nobody else."""
    if isinstance(out, Tensor):
        return out.detach() if out._is_view() else out
    return type(out)(map(_apart, out)) if type(out) in (list, tuple) else out
