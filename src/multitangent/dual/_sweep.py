"""Sweeps: the runs of a model whose dual tensors belong together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Current(threading.local):
    sweep: object | None = None


CURRENT = _Current()


@contextmanager
def sweep() -> Iterator[None]:
    """Dual tensors that are made inside this block may not be used inside another one."""
    outer, CURRENT.sweep = CURRENT.sweep, object()
    try:
        yield
    finally:
        CURRENT.sweep = outer


def check_sweep(made_in: object | None) -> None:
    """Raise where a dual tensor of one sweep is used in another one."""
    if made_in is None or CURRENT.sweep is None:
        return
    raise RuntimeError(
        "A model should keep tensors from one step to the next without their derivatives. Found "
        "a tensor that carries tangents of an earlier run of the model. Try `.detach()` where it "
        "is kept."
    )
