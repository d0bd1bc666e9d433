"""Dropout whose masks do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.objective._record import BatchRecord, sample_axis

# The axes, after the first, that share a mask.
_SHARED_AXES: dict[Callable[..., Any], int] = {
    F.dropout: 0,
    F.dropout1d: 1,
    F.dropout2d: 2,
    F.dropout3d: 3,
}
DROPOUTS = tuple(_SHARED_AXES)
Noise = Callable[[int, Sequence[int], torch.device], Tensor]


class Dropout:
    """Draws every mask for the whole batch, and takes the rows of the samples at hand.

    All tangents of a sample share one mask. A second run of the same module has the same masks.

    Args:
        noise: A function from the count of the call, a shape and a device to uniform numbers.
        rows: The samples at hand.
        batch_size: The number of samples of the whole batch.
        record: What the run of the whole batch left, or is to leave; ``None`` for neither.
        is_whole: Whether this is the run of the whole batch, which fills the record.

    Attributes:
        calls: How often dropout has been called.
    """

    def __init__(
        self,
        noise: Noise,
        rows: slice,
        batch_size: int,
        record: BatchRecord | None,
        is_whole: bool,
    ) -> None:
        self.calls = 0
        self._uniform = noise
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
        mask = (self._noise(shape, input) >= p).to(input.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(mask) if inplace else input * mask

    def _noise(self, shape: list[int], like: Tensor) -> Tensor:
        """Uniform numbers of a shape: those of the samples at hand."""
        call, self.calls = self.calls, self.calls + 1
        whole, place = self._place(call, shape)
        noise = self._uniform(call, whole, like.device)
        if place is None:
            return noise
        axis, count = place
        return noise.narrow(axis, count * self._rows.start, shape[axis])

    def _place(self, call: int, shape: list[int]) -> tuple[list[int], tuple[int, int] | None]:
        """The shape of a mask of the whole batch, and where the samples at hand are in it."""
        if self._record is None:
            return self._guess(shape)
        masks = self._record.masks
        if self._is_whole:
            whole, place = self._guess(shape) if self._is_part else (shape, None)
            masks.append(whole)
            return whole, place
        if call < len(masks):
            place = sample_axis(masks[call], shape, self._rows, self._batch_size)
            return (shape if place is None else masks[call]), place
        return shape, None

    @property
    def _is_part(self) -> bool:
        """Whether other processes have further samples of the batch."""
        return self._rows.stop - self._rows.start < self._batch_size

    def _guess(self, shape: list[int]) -> tuple[list[int], tuple[int, int] | None]:
        """The shape for the whole batch, if the first axis that can be that of samples is so."""
        size = self._rows.stop - self._rows.start
        for axis, length in enumerate(shape):
            if length % size == 0:
                count = length // size
                return [*shape[:axis], count * self._batch_size, *shape[axis + 1 :]], (axis, count)
        return shape, None
