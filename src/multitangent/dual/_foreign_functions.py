"""Functions that run without asking `__torch_function__` take dual tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from torch.utils import checkpoint

from multitangent.dual import _custom_function, _scripted

_lock = RLock()
_CHECKPOINTED = "_checkpoint_without_reentrant_generator"
_checkpointed = getattr(checkpoint, _CHECKPOINTED)


def _as_it_is(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What surrounds a checkpointed function: nothing, since no graph is longer than a layer."""
    yield


_users = 0


@contextmanager
def foreign_functions() -> Iterator[None]:
    """Inside this block `torch.autograd.Function` and TorchScript take dual tensors.

    Checkpointed functions run as they are: they would run again when no sweep is on.

    PyTorch asks nobody before it runs such a function, so that what calls it is replaced
    meanwhile. Functions that get no dual tensor run as ever.
    """
    global _users
    with _lock:
        _users += 1
        _custom_function.Base.apply = classmethod(_custom_function.apply)
        for kind in _scripted.CALLS:
            kind.__call__ = _scripted.call
        setattr(checkpoint, _CHECKPOINTED, _as_it_is)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                del _custom_function.Base.apply
                for kind, call in _scripted.CALLS.items():
                    kind.__call__ = call
                setattr(checkpoint, _CHECKPOINTED, _checkpointed)
