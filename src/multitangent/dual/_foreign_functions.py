"""Functions that run without asking `__torch_function__` take dual tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from multitangent.dual import _custom_function, _scripted

_lock = RLock()
_users = 0


@contextmanager
def foreign_functions() -> Iterator[None]:
    """Inside this block `torch.autograd.Function` and TorchScript take dual tensors.

    PyTorch asks nobody before it runs such a function, so that what calls it is replaced
    meanwhile. Functions that get no dual tensor run as ever.
    """
    global _users
    with _lock:
        _users += 1
        _custom_function.Base.apply = classmethod(_custom_function.apply)
        for kind in _scripted.CALLS:
            kind.__call__ = _scripted.call
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                del _custom_function.Base.apply
                for kind, call in _scripted.CALLS.items():
                    kind.__call__ = call
