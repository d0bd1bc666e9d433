"""Ordinary tensors that carry tangents once a dual tensor was written into them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from multitangent.dual._dual_tensor import DualTensor, make_dual


class _Scope(threading.local):
    adopted: list[tuple[weakref.ref[Tensor], type[Tensor]]] | None = None


_scope = _Scope()
_PARTS = tuple(DualTensor.__annotations__)


@contextmanager
def ordinary_afterwards() -> Iterator[None]:
    """Tensors that became dual inside this block are ordinary again behind it.

    They keep their values: a buffer of a model is written into for good.
    """
    outer, _scope.adopted = _scope.adopted, []
    try:
        yield
    finally:
        for reference, kind in _scope.adopted:
            tensor = reference()
            if tensor is not None:
                tensor.__class__ = kind
                for name in _PARTS:
                    tensor.__dict__.pop(name, None)
        _scope.adopted = outer


def adopt(tensor: Tensor, carried: torch.dtype) -> DualTensor:
    """Make an ordinary tensor a dual tensor of zero tangents: the same object, the same memory.

    Tensors that look into that memory become dual with it, as its views.

    Args:
        tensor: Of floating-point numbers.
        carried: The type of its tangents.
    """
    base = tensor if tensor._base is None else tensor._base
    views = [] if base is tensor else [tensor]
    if type(base) is not DualTensor:
        if base._use_count() > 1 + len(views):  # type: ignore[attr-defined]
            views = _views_of(base)  # a view keeps its base alive: there are others
        _change(base, carried)
    for view in views:
        replay = _replay(view, base)
        dual = _change(view, carried)
        dual._parent, dual._replay = base, replay  # type: ignore[assignment]
        dual._writes, dual._seen = base._writes, base._writes[0]  # type: ignore[attr-defined]
    return tensor  # type: ignore[return-value]


def _views_of(base: Tensor) -> list[Tensor]:
    """A base does not know its views: all objects of the process are looked through."""
    tensors = (item for item in gc.get_objects() if issubclass(type(item), Tensor))
    return [item for item in tensors if type(item) is not DualTensor and item._base is base]


def _change(tensor: Tensor, carried: torch.dtype) -> DualTensor:
    with torch.enable_grad():  # so that autograd may record what is written into it
        primal = tensor.view_as(tensor)
    dual = make_dual(primal, primal.new_zeros(0, *[1] * primal.ndim, dtype=carried))
    if _scope.adopted is not None:
        _scope.adopted.append((weakref.ref(tensor), type(tensor)))
    tensor.__class__ = DualTensor
    tensor.__dict__.update(vars(dual))
    return tensor  # type: ignore[return-value]


def _replay(view: Tensor, base: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How to take a view again of tangents of its base."""
    if not base.is_contiguous():
        return None
    size, strides, count = view.shape, view.stride(), base.numel()
    offset = view.storage_offset() - base.storage_offset()

    def replay(tangents: Tensor) -> Tensor:
        full = tangents.contiguous()
        return full.as_strided(
            (len(full), *size), (count, *strides), full.storage_offset() + offset
        )

    return replay
