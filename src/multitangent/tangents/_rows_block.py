"""Tangents of one site that are held as rows, kept or drawn again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.tangents._block import Block
from multitangent.tangents._request import Request

SMALL = 2**16  # numbers of a block that is not worth a product of its own
_LARGE = 2**24  # numbers that are held at once where the tangents of weights are not stored
_SAMPLES = 16  # drawn at a time where tangents per sample are not stored


class RowsBlock(Block):
    """Tangents that are held as rows ``[K, 1 or b, *shape]``."""

    @abstractmethod
    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The tangents and whose they are, as many samples at a time as are held at once."""

    @property
    def is_small(self) -> bool:
        """Whether the block is one of few numbers, better multiplied together with others."""
        return self._most_samples == 1 and self.num_tangents * self.dimension <= SMALL

    def flat_rows(self) -> Tensor:
        """All tangents as ``[1 or b, K, n]``."""
        return self._padded(self.rows())

    def gram(self) -> Tensor:
        return torch.cat([self._padded_gram(rows) for _, rows in self.pieces()])

    def _padded_gram(self, tangents: Tensor) -> Tensor:
        """The Gram matrices of tangents ``[at most K, 1 or b, *shape]`` as ``[1 or b, K, K]``."""
        gram = gram_of(_flat(tangents).transpose(0, 1))
        missing = self.num_tangents - len(tangents)
        return F.pad(gram, (0, missing, 0, missing)) if missing else gram

    def apply(self, gradient: Tensor) -> Tensor:
        rows, flat = self.flat_rows().to(gradient.dtype), gradient.reshape(len(gradient), -1)
        return rows[0] @ flat.mT if len(rows) == 1 else torch.einsum("bkn,bn->kb", rows, flat)

    def combine(self, coefficients: Tensor) -> Tensor:
        combined = []
        for samples, tangents in self.pieces():
            rows = _flat(tangents).to(self.request.dtype)
            weights = coefficients[: len(rows), ..., samples].to(rows.dtype)
            if rows.shape[1] == 1:
                total = weights.flatten(1).mT @ rows[:, 0]
                combined.append(total.view(*weights.shape[1:], -1))
            else:
                combined.append(torch.einsum("k...b,kbn->...bn", weights, rows))
        joined = combined[0] if len(combined) == 1 else torch.cat(combined, -2)
        return joined.reshape(*coefficients.shape[1:], *self.request.shape)

    @property
    def _most_samples(self) -> int:
        """How many samples have tangents of their own, at most."""
        # Guesses are a sample's own, even where random tangents are shared.
        shared = self.request.samples is None and not any(self.source.guesses)
        return 1 if shared else self.request.batch or 1

    def _padded(self, tangents: Tensor) -> Tensor:
        """Tangents ``[at most K, 1 or b, *shape]`` as ``[1 or b, K, n]``."""
        rows = _flat(tangents).transpose(0, 1)
        missing = self.num_tangents - len(tangents)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def _draw(self, request: Request) -> Tensor:
        block: Any = self.source.draw(request)
        of_samples = 1 if self._most_samples == 1 else request.batch
        fewest = 1 if any(self.source.guesses) else self.num_tangents
        fits = (
            isinstance(block, Tensor)
            and block.ndim == len(request.shape) + 2
            and fewest <= len(block) <= self.num_tangents
            and block.shape[1] in (1, of_samples)
            and block.shape[2:] == request.shape
            and block.dtype == request.dtype
        )
        if not fits:
            kind = type(block).__name__
            description = f"{list(block.shape)} of {block.dtype}" if kind == "Tensor" else kind
            raise ValueError(
                f"`draw` of {self.source!r} should return tangents of shape "
                f"{[self.num_tangents, of_samples, *request.shape]} of {request.dtype}, or "
                f"with 1 in place of the second axis. Found {description}."
            )
        return block.to(self.dtype)


class DenseBlock(RowsBlock):
    """Tangents that are drawn at the first use and kept."""

    is_stored = True
    _rows: Tensor | None = None

    def rows(self, samples: slice | None = None) -> Tensor:
        if self._rows is None:
            self._rows = self._draw(self.request)
        shared = samples is None or self._rows.shape[1] == 1
        return self._rows if shared else self._rows[:, samples]

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), self.rows()

    def total(self, chosen: Sequence[int], losses: Sequence[int]) -> Tensor:
        rows = self.rows()
        found = [rows[k].to(self.request.dtype) for k in chosen if k < len(rows)]
        if not found:
            return super().total(chosen, losses)
        total = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        if not losses:
            return total[0].clone(memory_format=torch.contiguous_format)  # the source may keep it
        return total.expand(*losses, *self.request.shape)


class RedrawnBlock(RowsBlock):
    """Tangents that are drawn at every use."""

    is_stored = False

    def rows(self, samples: slice | None = None) -> Tensor:
        return self._draw(self.request if samples is None else self.request.take(samples))

    def row(self, k: int, samples: slice | None = None) -> Tensor | None:
        request = self.request if samples is None else self.request.take(samples)
        rows = self.source.draw_one(request, k)
        return rows[0].to(self.dtype) if len(rows) else None

    def gram(self) -> Tensor:
        if not self._is_large:
            return super().gram()
        total = torch.zeros(
            1, self.num_tangents, self.num_tangents, dtype=torch.float64, device=self.request.device
        )
        for place, rows in self._tiles(0):
            for other, columns in self._tiles(place.stop):
                total[0, place, other] = _products(rows, columns)
                total[0, other, place] = total[0, place, other].mT
            total[0, place, place] = _products(rows, rows)
        return total

    def combine(self, coefficients: Tensor) -> Tensor:
        if not self._is_large:
            return super().combine(coefficients)
        dtype = self.request.dtype
        combined = coefficients.new_zeros(coefficients.shape[1], self.dimension, dtype=dtype)
        for place, rows in self._tiles(0):
            combined.addmm_(coefficients[place].to(dtype).mT, rows.to(dtype))
        return combined.view(-1, *self.request.shape)

    @property
    def _is_large(self) -> bool:
        """Whether all tangents of a weight are better not held at once."""
        return self.request.batch is None and self.num_tangents * self.dimension > _LARGE

    def _tiles(self, first: int) -> Iterator[tuple[slice, Tensor]]:
        """The tangents from `first` on, as many ``[k, n]`` as are held at once, and their places.

        The rows of one tile are gone before those of the next are drawn.
        """
        size = max(1, _LARGE // self.dimension)
        for start in range(first, self.num_tangents, size):
            stop = min(start + size, self.num_tangents)
            rows = [self.row(k) for k in range(start, stop)]
            zero = torch.zeros(1, 1, device=self.request.device, dtype=self.dtype)
            zero = zero.expand(1, self.dimension)
            tile = [zero if row is None else row.reshape(1, -1) for row in rows]
            del rows
            yield slice(start, stop), tile[0] if size == 1 else torch.cat(tile)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        count = self.request.batch
        if count is None or self.request.samples is None:
            yield slice(None), self.rows()
            return
        for start in range(0, count, _SAMPLES):
            samples = slice(start, min(start + _SAMPLES, count))
            piece = self.rows(samples)
            if start == 0 and piece.shape[1] < samples.stop:
                yield slice(None), piece  # the source shares its tangents after all
                return
            yield samples, piece


def _flat(tangents: Tensor) -> Tensor:
    """Tangents ``[K, 1 or b, *shape]`` as ``[K, 1 or b, n]``."""
    return tangents.reshape(*tangents.shape[:2], -1)


def gram_of(rows: Tensor) -> Tensor:
    """``V V^T`` in float64 for rows ``[1 or b, K, n]``."""
    rows = rows.double()
    return rows @ rows.mT


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ columns^T`` in float64 for ``[k, n]`` and ``[m, n]``, some numbers at a time."""
    size = max(1, _LARGE // 16)
    pieces = [slice(start, start + size) for start in range(0, rows.shape[1], size)]
    products = [rows[:, piece].double() @ columns[:, piece].double().mT for piece in pieces]
    return torch.stack(products).sum(0)
