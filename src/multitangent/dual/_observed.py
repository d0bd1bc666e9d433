"""Looking on while functions meet dual tensors."""

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
    """Inside this block an observer is asked for the value of every function of dual tensors.

    Args:
        observer: It is called as ``observer(compute, func, args, kwargs)``, and what it returns is
            the value. ``compute(func, args, kwargs)`` is the value that there would be without it.
    """
    compute = DISPATCH[0]
    DISPATCH[0] = partial(observer, compute)
    try:
        yield
    finally:
        DISPATCH[0] = compute
