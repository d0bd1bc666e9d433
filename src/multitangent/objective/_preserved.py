"""Buffers of a model that are afterwards what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def _any(module: nn.Module, name: str) -> bool:
    return True


class SavedBuffers:
    """A copy of a model's buffers, such as running averages and counters.

    Args:
        model: The model.
        of: Which of them, by module and name; all by default.
    """

    def __init__(self, model: nn.Module, of: Callable[[nn.Module, str], bool] = _any) -> None:
        self._saved = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and of(module, name)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, also where a module has put another tensor in a buffer's place."""
        for module, name, buffer, value in self._saved:
            buffer.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def preserved(model: nn.Module, of: Callable[[nn.Module, str], bool] = _any) -> Iterator[None]:
    """Leave a model's buffers as they are now, whatever happens in a ``with`` block."""
    saved = SavedBuffers(model, of)
    try:
        yield
    finally:
        saved.restore()
