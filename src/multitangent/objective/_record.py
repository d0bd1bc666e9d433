"""What a run of the whole batch leaves for runs of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent._deferred_checks import check, tracing
from multitangent.dual import primal
from multitangent.objective._state import version

EXPENSIVE: frozenset[Callable[..., Any]] = frozenset(
    {F.linear, torch.conv1d, torch.conv2d, torch.conv3d}
)


class PrimalCache:
    """The inputs and outputs of all expensive functions in one run of a model, in their order.

    They are those that autograd keeps for the local step anyway.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Tensor, int, Tensor, int]] = []

    def record(self, input: Any, out: Tensor) -> None:
        """Note one call."""
        x, y = primal(input).detach(), out.detach()
        self._calls.append((x, version(x), y, version(y)))

    def find(self, call: int, input: Any, rows: slice, batch_size: int) -> Tensor | None:
        """The output of a call for some samples, ``None`` unless it certainly is.

        A sample may have several rows, such as one for each token. The inputs are compared, since
        the first axis need not be the batch, and no tensor may have been written into.
        """
        if call >= len(self._calls):
            return None
        x, x_version, y, y_version = self._calls[call]
        part = primal(input)
        per_sample, rest = divmod(x.shape[0], batch_size)
        chosen = slice(per_sample * rows.start, per_sample * rows.stop)
        if (
            rest != 0
            or x.shape[1:] != part.shape[1:]
            or part.shape[0] != chosen.stop - chosen.start
            or (version(x), version(y)) != (x_version, y_version)
            or not _alike(part, x[chosen])
        ):
            return None
        return y[chosen]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree, but for rounding."""
    may_be_equal = a.dtype == b.dtype and not tracing()
    if may_be_equal and torch.equal(a, b):  # the cheaper test
        return True
    largest = partial(torch.linalg.vector_norm, ord=torch.inf)
    return check(largest(a - b) <= 1e-4 * largest(b))


class BatchRecord:
    """What a run of the whole batch leaves for runs of its parts, in the order of its calls.

    Args:
        reuse: Whether to keep what expensive functions return.

    Attributes:
        statistics: Mean and variance of every batch normalisation.
        random: The results of random functions.
        masks: The shapes of the masks of dropout.
        primals: What expensive functions returned.
    """

    def __init__(self, *, reuse: bool) -> None:
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self.random: list[Tensor] = []
        self.masks: list[list[int]] = []
        self.primals = PrimalCache() if reuse else None

    def to_differentiate(self) -> BatchRecord:
        """The same for a run that is differentiated: every primal is computed."""
        other = BatchRecord(reuse=False)
        other.statistics, other.random, other.masks = self.statistics, self.random, self.masks
        return other


def sample_axis(
    whole: Sequence[int], part: Sequence[int], rows: slice, batch_size: int
) -> tuple[int, int] | None:
    """The axis of the samples in a value of the whole batch, and how many entries a sample has.

    It is the axis whose size depends on how many samples there are.

    Args:
        whole: The value's shape for the whole batch.
        part: Its shape for the samples `rows`.
        rows: Which samples these are.
        batch_size: The number of samples of the whole batch.
    """
    size = rows.stop - rows.start
    if len(whole) != len(part):
        return None
    differing = [
        axis for axis, lengths in enumerate(zip(whole, part, strict=True)) if len(set(lengths)) > 1
    ]
    if len(differing) != 1:
        return None
    axis = differing[0]
    count, rest = divmod(part[axis], size)
    return (axis, count) if rest == 0 and whole[axis] == count * batch_size else None
