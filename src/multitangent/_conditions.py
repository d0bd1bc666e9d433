"""Conditions on values, which a compiled step checks after the fact."""

from __future__ import annotations

import threading

from torch import Tensor


class NonFiniteError(ValueError):
    """A value is infinite or not a number."""


class _Collector(threading.local):
    conditions: list[Tensor] | None = None


_collector = _Collector()


def holds(condition: Tensor) -> bool:
    """Whether a condition on values is true; while a step is traced it is assumed, and noted."""
    if _collector.conditions is None:
        return bool(condition)
    _collector.conditions.append(condition)
    return True


def tracing() -> bool:
    """Whether a step is being traced."""
    return _collector.conditions is not None


class assumed:  # noqa: N801 (a context manager, used like a function)
    """Collect the conditions that are assumed inside a ``with`` block."""

    def __enter__(self) -> list[Tensor]:
        _collector.conditions = []
        return _collector.conditions

    def __exit__(self, *exception: object) -> None:
        _collector.conditions = None
