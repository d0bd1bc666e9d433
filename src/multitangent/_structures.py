"""Tensors inside nested structures: what `pytree` knows, other mappings, and dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A structure of the same kind, with every tensor replaced by the function's value for it."""
    if isinstance(value, Tensor):
        return function(value)

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        parts = _parts(leaf)
        if parts is None or not tensors_of(list(parts.values())):
            return leaf
        return _rebuilt(leaf, {key: map_tensors(function, part) for key, part in parts.items()})

    return pytree.tree_map(mapped, value)


def copied(value: Any, device: torch.device) -> Any:
    """The same structure with copies of its tensors on a device; scalars keep their device."""

    def copy_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device if leaf.ndim else leaf.device, copy=True)

    return pytree.tree_map(copy_of, value)


def leaves_of(value: Any) -> Iterator[Any]:
    """What a structure holds that is no structure itself, in the order of `map_tensors`."""
    for leaf in pytree.tree_leaves(value):
        parts = None if isinstance(leaf, Tensor) else _parts(leaf)
        if parts is None:
            yield leaf
        else:
            yield from leaves_of(list(parts.values()))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a structure."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def hidden_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that `map_tensors` misses, in sets and attributes, with the type that holds them."""
    for leaf in leaves_of(value):
        if not isinstance(leaf, (Tensor, type, torch.nn.Module)):
            for tensor in tensors_of(_contents(leaf)):
                yield type(leaf).__name__, tensor


def _contents(leaf: Any) -> list[Any]:
    """The attributes of an object, or the members of a set."""
    if isinstance(leaf, (set, frozenset)):
        return list(leaf)
    slots = [name for kind in type(leaf).__mro__ for name in kind.__dict__.get("__slots__", ())]
    return [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, n, None) for n in slots)]


def _parts(leaf: Any) -> dict[Any, Any] | None:
    """What a structure that `pytree` takes for a leaf consists of; ``None`` if it is none."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {f.name: getattr(leaf, f.name) for f in fields(leaf) if hasattr(leaf, f.name)}
    if isinstance(leaf, (list, tuple)) and not isinstance(leaf, torch.Size):
        return dict(enumerate(leaf))
    return None


def _rebuilt(leaf: Any, parts: dict[Any, Any]) -> Any:
    """The same structure made of other parts."""
    if isinstance(leaf, tuple):
        items = parts.values()
        return type(leaf)(*items) if hasattr(leaf, "_fields") else type(leaf)(items)
    if isinstance(leaf, Mapping) and not isinstance(leaf, MutableMapping):
        return type(leaf)(parts)  # type: ignore[call-arg]
    result = copy.copy(leaf)
    for key, part in parts.items():
        if isinstance(leaf, (MutableMapping, list)):
            result[key] = part
        else:
            object.__setattr__(result, key, part)  # also where the dataclass is frozen
    return result
