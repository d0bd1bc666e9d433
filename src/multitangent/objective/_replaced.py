"""Other tensors in the place of a model's parameters, for the duration of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# What recurrent layers keep of their parameters besides the parameters themselves.
_CACHES = ("_flat_weights", "_flat_weight_refs")


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters and buffers, wherever these stand in the model.

    A parameter may stand in several places, and a module under several names. Whatever happens in
    the ``with`` block, the model holds afterwards what it held before.

    Args:
        model: The model.
        values: The tensors by the names of ``named_parameters()`` and ``named_buffers()``.
    """
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    stand_ins = {id(known[name]): value for name, value in values.items()}
    places: list[tuple[dict[str, Any], str, Any]] = [
        (store, name, tensor)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if id(tensor) in stand_ins
    ]
    caches: list[tuple[dict[str, Any], str, Any]] = [
        (module.__dict__, name, list(module.__dict__[name]))
        for module in model.modules()
        for name in _CACHES
        if name in module.__dict__
    ]
    try:
        for store, name, tensor in places:
            store[name] = stand_ins[id(tensor)]
        yield
    finally:
        for store, name, original in [*places, *caches]:
            store[name] = original
