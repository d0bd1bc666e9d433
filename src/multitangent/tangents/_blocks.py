"""The K tangents V, held as named blocks and never put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.tangents._source import Request, TangentSource

_SMALL = 2**16  # numbers of a block that is not worth a product of its own
_SAMPLES = 16  # drawn at a time where tangents per sample are not stored


class Block:
    """The tangents of one site: drawn at the first use and stored, or drawn at every use.

    Args:
        source: Where they come from.
        request: What is drawn.
        store: Whether to keep what was drawn.
        dtype: The type in which tangents are carried, by default that of the perturbed value.

    Raises:
        ValueError: When drawn, if the source returns another shape or type.
    """

    def __init__(
        self,
        source: TangentSource,
        request: Request,
        *,
        store: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.request = request
        self.count = source.num_tangents
        self._source = source
        self._store = store
        self.dtype = request.dtype if dtype is None else dtype
        self._stored: Tensor | None = None

    @property
    def dimension(self) -> int:
        """The number of perturbed scalars, per sample for activations."""
        return prod(self.request.shape)

    def tell(self, output: Tensor, output_gradient: Tensor) -> None:
        """Add to what the source knows, before the first use."""
        self.request = replace(self.request, output=output, output_gradient=output_gradient)

    def rows(self, samples: slice | None = None) -> Tensor:
        """The tangents of all or some samples, ``[at most K, 1 or b, *shape]``.

        Rows that are missing at the end are zero.
        """
        if self._store and self._stored is None:
            self._stored = self._draw(self.request)
        if self._stored is not None:
            shared = samples is None or self._stored.shape[1] == 1
            return self._stored if shared else self._stored[:, samples]
        return self._draw(self.request if samples is None else self.request.take(samples))

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The tangents and whose they are, a few samples at a time where they are redrawn."""
        count = self.request.batch
        if count is None or self._store or self.request.samples is None:
            yield slice(None), self.rows()
            return
        for start in range(0, count, _SAMPLES):
            samples = slice(start, min(start + _SAMPLES, count))
            piece = self.rows(samples)
            if start == 0 and piece.shape[1] < samples.stop:
                yield slice(None), piece  # the source shares its tangents after all
                return
            yield samples, piece

    def _draw(self, request: Request) -> Tensor:
        block = self._source.draw(request)
        guesses = any(self._source.informed)  # of a sample, even where random tangents are shared
        own = 1 if request.samples is None and not guesses else request.batch or 1
        counts = range(1, self.count + 1) if guesses else (self.count,)
        shape = len(block) in counts and block.shape[1] in (1, own)
        if not shape or block.shape[2:] != request.shape or block.dtype != request.dtype:
            wanted = f"[{self.count}, {own}, *{list(request.shape)}] of {request.dtype}"
            raise ValueError(
                f"`draw` of {self._source!r} should return tangents of shape {wanted}. Found "
                f"{list(block.shape)} of {block.dtype}."
            )
        return block.to(self.dtype)


class Tangents:
    """V: K vectors whose blocks ``[K, 1 or b, *shape]`` are added site by site.

    Examples:
        >>> from multitangent.tangents import Normal, Stream
        >>> tangents = Tangents()
        >>> request = Request(Stream(0, 0), 0, (3,), None, 0, torch.float32, torch.device("cpu"))
        >>> tangents.add("hidden", Block(Normal(2), request, store=True))
        >>> tangents.gram().shape, tangents.dimension
        (torch.Size([2, 2]), 3)
    """

    def __init__(self) -> None:
        self.blocks: dict[str, Block] = {}

    def add(self, name: str, block: Block) -> None:
        """Add the block of one site."""
        self.blocks[name] = block

    @property
    def dimension(self) -> int:
        """n: the number of perturbed scalars, per sample for activations."""
        return sum(block.dimension for block in self.blocks.values())

    def gram(self) -> Tensor:
        """``V V^T`` in float64, the sum over the blocks: ``[K, K]``, or ``[b, K, K]``."""
        small, grams = [], []
        for block in self.blocks.values():
            pieces = [_rows(tangents, block.count) for _, tangents in block.pieces()]
            if len(pieces) == 1 and pieces[0].numel() <= _SMALL and len(pieces[0]) == 1:
                small.append(pieces[0])
            else:
                grams.append(torch.cat([_gram(rows) for rows in pieces]))
        if small:  # one product for many blocks
            grams.append(_gram(torch.cat(small, 2)))
        total = grams[0] if len(grams) == 1 else sum(grams[1:], start=grams[0])
        return total[0] if len(total) == 1 else total

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``g = V^T c`` for coefficients ``[K, b]``, block by block: ``[b, *shape]``."""
        return {name: _combined(block, coefficients) for name, block in self.blocks.items()}


def _rows(tangents: Tensor, count: int) -> Tensor:
    """Tangents ``[at most K, 1 or b, *shape]`` as ``[1 or b, K, n]``."""
    rows = tangents.reshape(*tangents.shape[:2], -1).transpose(0, 1)
    missing = count - len(tangents)
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows @ rows.mT


def _combined(block: Block, coefficients: Tensor) -> Tensor:
    combined = []
    for samples, tangents in block.pieces():
        rows = tangents.reshape(*tangents.shape[:2], -1)  # [K, 1 or b, n]
        rows = rows.to(block.request.dtype)
        weights = coefficients[: len(rows), samples].to(rows.dtype)
        if rows.shape[1] == 1:
            combined.append(weights.mT @ rows[:, 0])
        else:
            combined.append(torch.einsum("kb,kbn->bn", weights, rows))
    together = combined[0] if len(combined) == 1 else torch.cat(combined)
    return together.reshape(-1, *block.request.shape)
