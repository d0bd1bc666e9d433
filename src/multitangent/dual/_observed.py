"""Observing the functions that meet dual tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from multitangent.dual._registry import DISPATCH

Function = Callable[..., Any]
Observer = Callable[[Function, Function, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def observed_functions(observer: Observer) -> Iterator[None]:
    """Ask an observer for the value of every function of dual tensors inside this block.

    Args:
        observer: It is called as ``observer(compute, func, args, kwargs)``, and returns the value.
            ``compute(func, args, kwargs)`` is the value without an observer.
    """
    compute = DISPATCH[0]
    DISPATCH[0] = partial(observer, compute)
    try:
        yield
    finally:
        DISPATCH[0] = compute
