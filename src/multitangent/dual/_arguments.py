"""The dual tensors among the arguments of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._dual_tensor import DualTensor


def primals(value: Any) -> Any:
    """Arguments with every dual tensor replaced by its primal."""
    return map_duals(lambda dual: dual.primal, value)


def map_duals(function: Callable[[DualTensor], Any], value: Any) -> Any:
    """Arguments with every dual tensor replaced by the function's value for it."""
    if isinstance(value, Tensor):
        return function(value) if type(value) is DualTensor else value
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple):
        items = [map_duals(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_duals(function, item) for item in value]
    if isinstance(value, dict):
        return {key: map_duals(function, item) for key, item in value.items()}
    return value


def find_duals(value: Any) -> Iterator[DualTensor]:
    """The dual tensors among arguments, in order."""
    if isinstance(value, Tensor):
        if type(value) is DualTensor:
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from find_duals(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_duals(item)
