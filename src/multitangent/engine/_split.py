"""Whether a batch may be split: its parts have to give what the whole gives."""

from __future__ import annotations

import torch
from torch import Tensor

from multitangent._deferred_checks import check
from multitangent.perturbation import Run


class SplitError(RuntimeError):
    """Parts of a batch do not give the losses of the whole."""


def agree(parts: Tensor, whole: Tensor) -> bool:
    """Whether losses ``[B]`` agree, but for rounding."""
    if parts.shape != whole.shape:
        return False
    difference, largest = (parts - whole).abs(), whole.abs().max()
    return check((difference <= tolerance(whole) * largest).all() | ~whole.isfinite().all())


def tolerance(value: Tensor) -> float:
    """How much results of a type may differ by rounding, relative to their size."""
    if torch.is_autocast_enabled(value.device.type) or value.dtype.itemsize == 2:
        return 0.3
    return 1e-6 if value.dtype == torch.float64 else 1e-2


def losses_of_two_parts(run: Run, micro_batch: int) -> Tensor:
    """The losses of the first two parts of a batch, run as one without tangents."""
    count = min(2 * micro_batch, run.batch.size)
    return run.evaluate(run.batch.take(slice(0, count)), unchanged).losses.detach()


def unchanged(value: Tensor, name: str, samples: slice) -> Tensor:
    """The value as it is. A model that asks for its graph finds none."""
    return value
