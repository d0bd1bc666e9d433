"""What modules keep from one run to the next, to be put back where they run more than once."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multitangent.dual import find_duals, map_duals

_CONSTANT = frozenset({bool, float, int, str, type(None)})
_SIMPLE = _CONSTANT | {Tensor}
_OWN = frozenset(nn.Module().__dict__)  # what every module has
_MOST_ITEMS = 1000  # of a container that is searched for tensors
_Place = tuple[dict[str, Any], str]


class SavedState:
    """A copy of what modules keep: buffers, attributes, and the states of random generators.

    Lists, dictionaries and sets are copied with what they hold; other objects are not looked into.

    Args:
        modules: The modules; those inside of them are found.
        with_generators: Whether the states of Python's and NumPy's random generators count.
    """

    def __init__(self, modules: Sequence[nn.Module], *, with_generators: bool = True) -> None:
        self.modules = modules
        self.values: dict[tuple[int, str], tuple[_Place, _Saved]] = {
            (id(store), name): ((store, name), _Saved(store[name]))
            for store, name in _places(modules)
        }
        self.generators = _generators() if with_generators else None

    def restore(self) -> None:
        """Put everything back; attributes that are new since then go."""
        for store, name in list(_places(self.modules)):
            if (id(store), name) not in self.values:
                del store[name]
        for (store, name), saved in self.values.values():
            store[name] = saved.put()
        _set_generators(self.generators)

    def is_touched(self) -> bool:
        """Whether anything may have changed since, or was written anew."""
        return any(
            store.get(name) is not saved.value or saved.is_touched()
            for (store, name), saved in self.values.values()
        )

    def differing(self, other: SavedState, tolerance: float) -> list[str]:
        """Where another state is different: numbers and tensors by the names of their places."""
        names = {
            id(store): f"{name}." if name else ""
            for root in self.modules
            for name, module in root.named_modules()
            for store in (module._buffers, module.__dict__)
        }
        found = []
        for key in self.values | other.values:
            place, own = self.values.get(key, (None, None))
            place, others = other.values.get(key, (place, None))
            assert place is not None
            if own is None or others is None or not own.is_like(others, tolerance):
                found.append(f"{names.get(key[0], '')}{place[1]}")
        return found


class Change:
    """What a run of modules changed in what they keep.

    Args:
        before: Their state before the run. It is compared with the present one.
    """

    def __init__(self, before: SavedState) -> None:
        self._after = after = SavedState(before.modules)
        self._places: list[tuple[_Place, _Saved | None, _Saved | None]] = []
        for key in before.values | after.values:
            place, old = before.values.get(key, (None, None))
            place, new = after.values.get(key, (place, None))
            if old is None or new is None or not old.equals(new):
                assert place is not None
                self._places.append((place, old, new))
        self._generators = before.generators, after.generators

    def __bool__(self) -> bool:
        old, new = self._generators
        return bool(self._places) or old != new

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside this block the state is that before the run."""
        self._put(0)
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside this block the state begins as that after the run, and it is so at the end."""
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        """The state after the run, also where a second run changed something else."""
        self._put(1)
        if self._after.is_touched():
            self._after.restore()

    def _put(self, which: int) -> None:
        for (store, name), *values in self._places:
            if (saved := values[which]) is not None:
                store[name] = saved.put()
            else:
                store.pop(name, None)
        _set_generators(self._generators[which])


def version(tensor: Tensor) -> int:
    """How often somebody has written into a tensor; of tensors of inference nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


class _Saved:
    """One value, and a copy of what can change in it."""

    __slots__ = ("copy", "value", "version")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.version = 0
        self.copy: Any = None
        if type(value) in _CONSTANT:
            return
        if isinstance(value, Tensor):
            self.version = version(value)
            if type(value) is Tensor and not value.requires_grad:
                self.copy = value.clone()
        elif isinstance(value, (list, deque)):
            small = len(value) <= _MOST_ITEMS
            self.copy = [_Saved(item) for item in value] if small else list(value)
        elif isinstance(value, set):
            changing = (item for item in value if isinstance(item, (Tensor, torch.Generator)))
            self.copy = frozenset(value), [_Saved(item) for item in changing]
        elif isinstance(value, dict):
            small = len(value) <= _MOST_ITEMS
            self.copy = {k: _Saved(v) for k, v in value.items()} if small else dict(value)
        elif isinstance(value, torch.Generator):
            self.copy = value.get_state()

    def put(self) -> Any:
        """The value as it was."""
        value, copy = self.value, self.copy
        if copy is None:
            return value
        if isinstance(value, Tensor):
            if value.shape == copy.shape:  # unnoticed by graphs, for which it is what it was
                value.data.copy_(copy)
            else:
                value.data = copy.clone()
        elif isinstance(value, dict):
            value.clear()
            value.update({name: _put(item) for name, item in copy.items()})
        elif isinstance(value, torch.Generator):
            value.set_state(copy)
        elif isinstance(value, set):
            items, changing = copy
            if value != items:  # a set that is filled again may have another order
                value.clear()
                value.update(items)
            for item in changing:
                item.put()
        else:
            value.clear()
            value.extend(_put(item) for item in copy)
        return value

    def is_touched(self) -> bool:
        """Whether the value may have changed since."""
        if isinstance(self.value, Tensor):
            return version(self.value) != self.version
        return self.copy is not None and not self.equals(_Saved(self.value))

    def is_like(self, other: _Saved, tolerance: float) -> bool:
        """Whether it is nearly the same; what can not be compared counts as the same."""
        a, b = self.copy, other.copy
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or not a.is_floating_point():
                return a.shape == b.shape and torch.equal(a, b)
            largest = float(a.nan_to_num().abs().max()) if a.numel() else 0.0
            return torch.allclose(a, b, tolerance, tolerance * largest, equal_nan=True)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(
                _is_like(*pair, tolerance) for pair in zip(a, b, strict=True)
            )
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(_is_like(a[k], b[k], tolerance) for k in a)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a[0]) == len(b[0]) and _simple_items(a[0]) == _simple_items(b[0])
        if isinstance(self.value, (int, float, str)) and type(self.value) is type(other.value):
            return bool(self.value == other.value) or self.value != self.value
        return True

    def equals(self, other: _Saved) -> bool:
        """Whether nothing has changed between two moments of one value."""
        if self.value is not other.value:
            simple = isinstance(self.value, (int, float, str))
            return simple and type(self.value) is type(other.value) and self.value == other.value
        return _equal(self.copy, other.copy)


def _is_like(a: Any, b: Any, tolerance: float) -> bool:
    return a.is_like(b, tolerance) if type(a) is _Saved and type(b) is _Saved else True


def _simple_items(items: frozenset[Any]) -> set[Any]:
    return {item for item in items if isinstance(item, (int, float, str))}


def _put(item: Any) -> Any:
    return item.put() if type(item) is _Saved else item


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, _Saved):
        return isinstance(b, _Saved) and a.equals(b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[name], b[name]) for name in a)
    return a is b or bool(a == b)


def _places(modules: Sequence[nn.Module]) -> Iterator[_Place]:
    """Where modules keep something: their buffers, and attributes that not every module has."""
    for root in modules:
        for module in root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield module._buffers, name
            for name in module.__dict__.keys() - _OWN:
                yield module.__dict__, name


def _generators() -> tuple[Any, bytes | None]:
    """The states of Python's and NumPy's global random generators."""
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False))
    return random.getstate(), of_numpy


def _set_generators(states: tuple[Any, bytes | None] | None) -> None:
    if states is None:
        return
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(pickle.loads(states[1]))


def release(modules: Sequence[nn.Module]) -> None:
    """Put plain tensors in the place of dual ones that modules have kept."""
    for store, name in _dual_places(modules):
        store[name] = map_duals(lambda dual: dual.primal.detach(), store[name])


def dual_names(modules: Sequence[nn.Module]) -> list[str]:
    """The names of dual tensors that modules keep."""
    return [name for _, name in _dual_places(modules)]


def _dual_places(modules: Sequence[nn.Module]) -> list[_Place]:
    return [
        (store, name)
        for root in modules
        for module in root.modules()
        for store in (module._buffers, module.__dict__)
        for name, value in store.items()
        if type(value) not in _SIMPLE and name not in _OWN and _has_duals(value)
    ]


def _has_duals(value: Any) -> bool:
    if not isinstance(value, (Tensor, list, tuple, dict)):
        return False
    if not isinstance(value, Tensor) and len(value) > _MOST_ITEMS:
        return False
    return next(find_duals(value), None) is not None
