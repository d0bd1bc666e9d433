"""Checks of values that a compiled step makes after the fact."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class _Collected(threading.local):
    conditions: list[Tensor] | None = None


_collected = _Collected()


def check(condition: Tensor) -> bool:
    """Whether a condition on values is true; while a step is traced it is assumed, and noted."""
    if _collected.conditions is None:
        return bool(condition)
    _collected.conditions.append(condition)
    return True


def are_finite(*values: Tensor) -> bool:
    """Whether all values are finite. A finite sum shows that they are."""
    total, *others = [value.sum() for value in values]
    for other in others:
        total = total + other
    if check(total - total == 0):
        return True
    return all(bool(value.isfinite().all()) for value in values)  # their sum may overflow


def tracing() -> bool:
    """Whether a step is being traced."""
    return _collected.conditions is not None


@contextmanager
def deferred_checks() -> Iterator[list[Tensor]]:
    """Collect the conditions that are checked inside a ``with`` block, and assume that they hold.

    An inner block keeps its conditions to itself.
    """
    outer, _collected.conditions = _collected.conditions, []
    try:
        yield _collected.conditions
    finally:
        _collected.conditions = outer
