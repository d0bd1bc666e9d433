"""Rows of independent random numbers: any of them can be drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from multitangent.tangents import _philox
from multitangent.tangents._stream import Stream

_TOGETHER = 16  # rows at most that have a generator in common,
_SHORT = 4096  # and numbers at most
_GAP = 2**31  # between the numbers of two samples' first rows
Fill = Callable[[Tensor, torch.Generator], object]


@dataclass(frozen=True)
class IndependentRows:
    """Draws the random rows of one block.

    Row k of a shared block is a function of (seed, step, site, k) and of the size of the block's
    rows, whatever K is. The rows of a sample are a function of (seed, step, site, sample).

    Args:
        stream: Random numbers of the step.
        site: The count of the site in the sweep.
        shape: The shape of the perturbed value, of one sample for activations.
        samples: The samples that want tangents of their own, ``None`` to share one set.
        first: The number of tangents that other sources draw before these.
        dtype: The type of the numbers.
        device: Where they are wanted.
        place: What tells them from other rows of the same site, if there are several kinds.
    """

    stream: Stream
    site: int
    shape: tuple[int, ...]
    samples: Sequence[int] | None
    first: int
    dtype: torch.dtype
    device: torch.device
    place: tuple[int | str, ...] = ()

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers.

        Args:
            count: K, the number of rows.

        Returns:
            ``[K, 1, *shape]``, or ``[K, b, *shape]`` for b samples of their own.
        """
        if self.stream.kind == "philox":
            return self._counted(count, _philox.normal)
        return self._drawn(count, lambda row, generator: row.normal_(generator=generator))

    def uniform(self, count: int) -> Tensor:
        """Numbers from 0 to 1, as `normal`."""
        if self.stream.kind == "philox":
            return self._counted(count, _philox.uniform)
        return self._drawn(count, lambda row, generator: row.uniform_(generator=generator))

    def rademacher(self, count: int) -> Tensor:
        """+1 or -1, each with probability one half, as `normal`."""
        if self.stream.kind == "philox":
            return self._counted(count, _philox.rademacher)
        return self._drawn(
            count, lambda row, generator: row.random_(0, 2, generator=generator).mul_(2).sub_(1)
        )

    def _counted(self, count: int, draw: _philox.Draw) -> Tensor:
        """Rows by their numbers: those of samples follow one another with wide gaps."""
        own = self.samples
        samples = torch.zeros(1, dtype=torch.int64) if own is None else torch.tensor(list(own))
        place = (self.site, *self.place, "shared" if own is None else "sample")
        rows = torch.arange(self.first, self.first + count)[:, None] + _GAP * samples
        size = prod(self.shape)

        def numbers(stream: Stream) -> Tensor:
            key = stream.fold_in(*place)
            return draw(rows.flatten().to(self.device), size, key, self.dtype)

        return self.stream.drawn(numbers).view(count, len(samples), *self.shape)

    def _drawn(self, count: int, fill: Fill) -> Tensor:
        if self.samples is None:
            shared = self.stream.drawn(lambda stream: self._shared(stream, count, fill))
            return shared.view(count, 1, *self.shape)
        samples = self.samples
        draws = self.stream.drawn(lambda stream: self._of_samples(stream, samples, count, fill))
        return draws.transpose(0, 1).reshape(count, len(samples), *self.shape)

    def _of_samples(self, stream: Stream, samples: Sequence[int], count: int, fill: Fill) -> Tensor:
        """Rows ``[b, K, n]``, with a generator for every sample."""
        draws = self._empty(len(samples), count, prod(self.shape))
        first = stream.fold_in(self.site, *self.place, "sample", self.first)
        for sample, rows in zip(samples, draws.unbind(), strict=True):
            fill(rows, stream.generator(self.device, first + sample))
        return draws

    def _shared(self, stream: Stream, count: int, fill: Fill) -> Tensor:
        """Rows ``[K, n]``, of which short ones have a generator in common, always filled whole."""
        size = prod(self.shape)
        together = max(1, min(_TOGETHER, _SHORT // max(size, 1)))
        first = self.first // together
        groups = range(first, -(-(self.first + count) // together))
        rows = self._empty(len(groups), together * size)
        key = stream.fold_in(self.site, *self.place)
        filled = rows.unbind() if len(groups) > 1 else (rows[0],)
        for group, row in zip(groups, filled, strict=True):
            fill(row, stream.generator(self.device, key + group))
        start = self.first - first * together
        return rows.view(-1, size)[start : start + count]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
