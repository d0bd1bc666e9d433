"""The K tangents V, held as named blocks and never put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.tangents._observation import Needs
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource
from multitangent.tangents._stream import Stream

_SMALL = 2**16  # numbers of a block that is not worth a product of its own
_LARGE = 2**24  # numbers that are held at once where the tangents of weights are not stored
_SAMPLES = 16  # drawn at a time where tangents per sample are not stored


class Block(ABC):
    """The tangents of one site, and what is computed with them.

    Args:
        source: Where they come from.
        request: What is drawn.
        dtype: The type in which tangents are carried, by default that of the perturbed value.

    Attributes:
        is_stored: Whether the tangents are kept from the first use on.
    """

    is_stored: bool

    def __init__(
        self, source: TangentSource, request: Request, dtype: torch.dtype | None = None
    ) -> None:
        self.request = request
        self.num_tangents = source.num_tangents
        self.dtype = request.dtype if dtype is None else dtype
        self._source = source

    @property
    def dimension(self) -> int:
        """The number of perturbed scalars, per sample for activations."""
        return prod(self.request.shape)

    def with_output(self, output: Tensor, output_gradient: Tensor) -> None:
        """Add the model's output to what the source knows, before the first use."""
        self.request = replace(self.request, output=output, output_gradient=output_gradient)

    @abstractmethod
    def rows(self, samples: slice | None = None) -> Tensor:
        """The tangents of all or some samples, ``[at most K, 1 or b, *shape]``.

        Rows that are missing at the end are zero.

        Raises:
            ValueError: If the source returns another shape or type.
        """

    def row(self, k: int, samples: slice | None = None) -> Tensor | None:
        """Tangent k of all or some samples, ``[1 or b, *shape]``; ``None`` if it is missing."""
        rows = self.rows(samples)
        return rows[k] if k < len(rows) else None

    @abstractmethod
    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The tangents and whose they are, as many samples at a time as are held at once."""

    @property
    def is_small(self) -> bool:
        """Whether the block is one of few numbers, better multiplied together with others."""
        return self._most_samples == 1 and self.num_tangents * self.dimension <= _SMALL

    def flat_rows(self) -> Tensor:
        """All tangents as ``[1 or b, K, n]``."""
        return self._padded(self.rows())

    def gram(self) -> Tensor:
        """``V V^T`` of this block in float64, ``[1 or b, K, K]``."""
        return torch.cat([gram_of(self._padded(rows)) for _, rows in self.pieces()])

    def apply(self, gradient: Tensor) -> Tensor:
        """``V g``, the directional derivatives ``[K, b]`` for gradients ``[b, *shape]``."""
        rows, flat = self.flat_rows().to(gradient.dtype), gradient.reshape(len(gradient), -1)
        return rows[0] @ flat.mT if len(rows) == 1 else torch.einsum("bkn,bn->kb", rows, flat)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``V^T c`` for coefficients ``[K, *losses]``, the gradients ``[*losses, *shape]``.

        Where each sample has tangents of its own, the samples are the last axis of the losses.
        """
        combined = []
        for samples, tangents in self.pieces():
            rows = _flat(tangents).to(self.request.dtype)
            weights = coefficients[: len(rows), ..., samples].to(rows.dtype)
            if rows.shape[1] == 1:
                flat = weights.flatten(1).mT @ rows[:, 0]
                combined.append(flat.view(*weights.shape[1:], -1))
            else:
                combined.append(torch.einsum("k...b,kbn->...bn", weights, rows))
        joined = combined[0] if len(combined) == 1 else torch.cat(combined, -2)
        return joined.reshape(*coefficients.shape[1:], *self.request.shape)

    @property
    def _most_samples(self) -> int:
        """How many samples have tangents of their own, at most."""
        # Guesses are a sample's own, even where random tangents are shared.
        shared = self.request.samples is None and not any(self._source.guesses)
        return 1 if shared else self.request.batch or 1

    def _padded(self, tangents: Tensor) -> Tensor:
        """Tangents ``[at most K, 1 or b, *shape]`` as ``[1 or b, K, n]``."""
        rows = _flat(tangents).transpose(0, 1)
        missing = self.num_tangents - len(tangents)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def _draw(self, request: Request) -> Tensor:
        block: Any = self._source.draw(request)
        of_samples = 1 if self._most_samples == 1 else request.batch
        fewest = 1 if any(self._source.guesses) else self.num_tangents
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
                f"`draw` of {self._source!r} should return tangents of shape "
                f"{[self.num_tangents, of_samples, *request.shape]} of {request.dtype}, or "
                f"with 1 in place of the second axis. Found {description}."
            )
        return block.to(self.dtype)


class DenseBlock(Block):
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


class RedrawnBlock(Block):
    """Tangents that are drawn at every use."""

    is_stored = False

    def rows(self, samples: slice | None = None) -> Tensor:
        return self._draw(self.request if samples is None else self.request.take(samples))

    def row(self, k: int, samples: slice | None = None) -> Tensor | None:
        request = self.request if samples is None else self.request.take(samples)
        rows = self._source.draw_one(request, k)
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


class Tangents:
    """V: K vectors whose blocks ``[K, 1 or b, *shape]`` are added site by site.

    Args:
        source: Where the tangents come from.
        stream: The random numbers of the step.
        store: Whether tangents are kept, or drawn again where they are needed.
        dtype: The type in which tangents are carried, by default the perturbed value's.

    Attributes:
        blocks: The blocks by the names of their sites.
        needs: What the source needs of this step.
        dtype: The type in which tangents are carried, ``None`` for the perturbed value's.

    Examples:
        >>> from multitangent.tangents import Normal
        >>> tangents = Tangents(Normal(2), Stream(0, 0))
        >>> block = tangents.add("hidden", torch.zeros(3))
        >>> tangents.gram().shape, tangents.dimension
        (torch.Size([2, 2]), 3)
        >>> tangents.combine(torch.ones(2))["hidden"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        source: TangentSource,
        stream: Stream,
        *,
        store: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self.stream = stream
        self.blocks: dict[str, Block] = {}
        # Asked once: a source may need the output of its first step only.
        self.needs = source.needs(stream.step)
        self._kind = DenseBlock if store else RedrawnBlock
        self.dtype = dtype

    @property
    def num_tangents(self) -> int:
        """K."""
        return self.source.num_tangents

    @property
    def dimension(self) -> int:
        """n: the number of perturbed scalars, per sample for activations."""
        return sum(block.dimension for block in self.blocks.values())

    def add(
        self,
        name: str,
        value: Tensor,
        shape: Sequence[int] | None = None,
        *,
        samples: Sequence[int] | None = None,
        target: Any = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> Block:
        """Add the block of one site.

        Args:
            name: The name of the site.
            value: What is perturbed. A source that needs it gets a copy: the model may write into
                it.
            shape: The shape of its tangents: of one sample for activations; by default the value's.
            samples: The samples that want tangents of their own, ``None`` to share one set.
            target: What the loss compares with, for sources that use it.
            loss: From outputs and target to the losses ``[b]``, for sources that use it.
        """
        kept = value.clone() if self.needs & Needs.PRIMAL else value
        request = Request(
            stream=self.stream,
            site=len(self.blocks),
            shape=tuple(value.shape if shape is None else shape),
            samples=samples,
            offset=self.dimension,
            dtype=value.dtype,
            device=value.device,
            name=name,
            value=kept,
            version=kept._version,
            target=target,
            loss=loss,
        )
        block = self.blocks[name] = self._kind(self.source, request, self.dtype)
        return block

    def with_output(self, output: Tensor, output_gradient: Tensor) -> None:
        """Add the model's output to what the source knows, before the first use of a block."""
        for block in self.blocks.values():
            block.with_output(output, output_gradient)

    def gram(self) -> Tensor:
        """``V V^T`` in float64, the sum over the blocks: ``[K, K]``, or ``[b, K, K]``."""
        small: list[Tensor] = []
        grams: list[Tensor] = []
        for block in self.blocks.values():
            if block.is_small:
                if not block.is_stored and sum(map(torch.numel, small)) > _SMALL:
                    grams.append(gram_of(torch.cat(small, 2)))  # memory is short
                    small.clear()
                small.append(block.flat_rows())
            else:
                grams.append(block.gram())
        if small:  # one product for many blocks
            grams.append(gram_of(torch.cat(small, 2)))
        if not grams:  # nothing is perturbed
            return torch.zeros(self.num_tangents, self.num_tangents, dtype=torch.float64)
        total = grams[0] if len(grams) == 1 else sum(grams[1:], start=grams[0])
        return total[0] if len(total) == 1 else total

    def apply(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``V g``: the directional derivatives ``[K, b]`` for gradients ``[b, *shape]`` by name."""
        jvps = [self.blocks[name].apply(gradient) for name, gradient in gradients.items()]
        return torch.stack(jvps).sum(0)

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``V^T c`` for coefficients ``[K, *losses]``, block by block: ``[*losses, *shape]``."""
        columns = coefficients if coefficients.ndim > 1 else coefficients.unsqueeze(1)
        combined = {name: block.combine(columns) for name, block in self.blocks.items()}
        if coefficients.ndim > 1:
            return combined
        return {name: gradient[0] for name, gradient in combined.items()}


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
