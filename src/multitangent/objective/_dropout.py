"""Dropout whose masks do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.objective._record import BatchRecord

# The axes, after the first, that share a mask.
_SHARED_AXES: dict[Callable[..., Any], int] = {
    F.dropout: 0,
    F.dropout1d: 1,
    F.dropout2d: 2,
    F.dropout3d: 3,
}
DROPOUTS = tuple(_SHARED_AXES)


class Dropout:
    """Draws every mask for the whole batch, and takes the rows of the samples at hand.

    All tangents of a sample share one mask. A second run of the same module has the same masks.

    Args:
        generator: Maps the count of the call to a seeded generator on a device.
        rows: The samples at hand.
        batch_size: The number of samples of the whole batch.
        record: What the run of the whole batch left, or is to leave; ``None`` for neither.
        is_whole: Whether this is the run of the whole batch, which fills the record.

    Attributes:
        calls: How often dropout has been called.
    """

    def __init__(
        self,
        generator: Callable[[int, torch.device], torch.Generator],
        rows: slice,
        batch_size: int,
        record: BatchRecord | None,
        is_whole: bool,
    ) -> None:
        self.calls = 0
        self._generator = generator
        self._rows = rows
        self._batch_size = batch_size
        self._record = record
        self._is_whole = is_whole

    def __call__(
        self,
        func: Callable[..., Any],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0:
            return input
        shape, shared = list(input.shape), _SHARED_AXES[func]
        if shared:
            shape[-shared:] = [1] * shared
        size = self._rows.stop - self._rows.start
        axis = self._batch_axis(input, size)
        if axis is None:
            noise = self._noise(shape, input)
        else:  # a sample may have several rows, such as one for each head of attention
            count = shape[axis] // size
            shape[axis] = count * self._batch_size
            noise = self._noise(shape, input)
            noise = noise.narrow(axis, count * self._rows.start, count * size)
        mask = (noise >= p).to(input.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(mask) if inplace else input * mask

    def _batch_axis(self, input: Tensor, size: int) -> int | None:
        """The axis of the samples: that of the whole batch, else the first that it can be."""
        axes = self._record.batch_axes if self._record is not None else []
        if not self._is_whole and self.calls < len(axes):
            return axes[self.calls]
        fitting = (axis for axis, length in enumerate(input.shape) if length % size == 0)
        axis = next(fitting, None)
        if self._is_whole and self._record is not None:
            axes.append(axis)
        return axis

    def _noise(self, shape: list[int], like: Tensor) -> Tensor:
        generator = self._generator(self.calls, like.device)
        self.calls += 1
        return torch.rand(shape, generator=generator, device=like.device)
