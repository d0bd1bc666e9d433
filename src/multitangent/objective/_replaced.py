"""Other tensors in the place of a model's parameters, for the duration of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
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


@contextmanager
def replaced_in_use(
    model: nn.Module, stand_in: Callable[[str], Tensor], names: Collection[str]
) -> Iterator[Mapping[int, Tensor]]:
    """Put other tensors in the place of parameters, each made whenever the model reaches for it.

    A tensor lives as long as somebody holds it, and the last one until the next is made. So a run
    without a graph holds those of one layer, and the parameters themselves stay as they are. What
    asks a module for a parameter gets the other tensor, with a memory of its own that any kernel
    can read.

    Args:
        model: The model.
        stand_in: Makes the tensor of a name.
        names: Of the parameters, as ``named_parameters()`` has them.

    Yields:
        The same tensors by the `id` of the parameters, for whoever holds the parameters themselves.
    """
    named = dict(model.named_parameters())
    stand_ins = _StandIns({id(named[name]): name for name in names}, stand_in)
    places = [
        (module.__dict__, module._parameters)
        for module in model.modules()
        if any(id(p) in stand_ins.names for p in module._parameters.values())
    ]
    try:
        for attributes, parameters in places:
            attributes["_parameters"] = _ParametersInUse(parameters, stand_ins)
        yield stand_ins
    finally:
        for attributes, parameters in places:
            attributes["_parameters"] = parameters


class _StandIns(Mapping[int, Tensor]):
    """Tensors in the place of parameters, by the `id` of these; only the last one is kept."""

    def __init__(self, names: Mapping[int, str], make: Callable[[str], Tensor]) -> None:
        self.names = names
        self._make = make
        self._last: tuple[int, Tensor] | None = None

    def __getitem__(self, key: int) -> Tensor:
        name = self.names[key]
        if self._last is None or self._last[0] != key:
            self._last = None  # the memory of the last one may serve for this one
            self._last = key, self._make(name)
        return self._last[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _ParametersInUse(dict[str, Any]):
    """The parameters of a module, in whose place others are handed out."""

    def __init__(self, parameters: Mapping[str, Any], stand_ins: _StandIns) -> None:
        super().__init__(parameters)
        self._stand_ins = stand_ins

    def _stand_in(self, value: Any) -> Any:
        return self._stand_ins[id(value)] if id(value) in self._stand_ins.names else value

    def __getitem__(self, name: str) -> Any:
        return self._stand_in(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._stand_in(super().get(name, default))

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]
