"""Tangents that are computed only when they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from multitangent.dual._factors import Factors, Part


class Deferred(ABC):
    """What a dual tensor may hold in place of its tangents.

    Attributes:
        dtype: The type of the tangents.
        is_kept: Whether a dual tensor keeps what was computed.
    """

    __slots__ = ()
    is_kept: ClassVar[bool] = True

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def computed(self) -> Tensor:
        """The tangents ``[K, *shape]``, axes of size 1 where they are constant."""

    def factored(self) -> Factored | None:
        """The factors of the tangents, where they are products of some."""
        return None


def computed(tangents: Tensor | Deferred) -> Tensor:
    """The tangents themselves."""
    return tangents.computed() if isinstance(tangents, Deferred) else tangents


class Factored(Deferred):
    """Tangents of a matrix in parts, one after the other, of which some are `Factors`.

    Functions that are linear in the matrix take the parts as they are. Any other function
    multiplies the factors, and the product is not kept.

    Args:
        parts: At least one: `Factors`, or tangents ``[k, m, *rest]``. Their k add up to K.

    Examples:
        >>> factored = Factored([Factors(torch.ones(2, 3, 1), torch.ones(2, 1, 4))])
        >>> factored.computed().shape
        torch.Size([2, 3, 4])
    """

    __slots__ = ("parts",)
    is_kept = False

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def computed(self) -> Tensor:
        return self.through(lambda rows: rows, Factors.multiplied)

    def take(self, chosen: range) -> Factored:
        """Consecutive tangents; a single one of zeros where there are none."""
        parts: list[Part] = []
        first = 0
        for part in self.parts:
            start, stop = (
                min(max(k - first, 0), part.shape[0]) for k in (chosen.start, chosen.stop)
            )
            if start < stop:
                rows = slice(start, stop)
                parts.append(part[rows] if isinstance(part, Tensor) else part.take(rows))
            first += part.shape[0]
        return Factored(parts or [torch.zeros_like(self.take(range(1)).computed())])

    def __len__(self) -> int:
        """K."""
        return sum(part.shape[0] for part in self.parts)

    def factored(self) -> Factored:
        return self

    def through(
        self, of_rows: Callable[[Tensor], Tensor], of_factors: Callable[[Factors], Tensor]
    ) -> Tensor:
        """The tangents ``[K, *result]`` of a function that is linear in the matrix.

        Args:
            of_rows: From tangents ``[k, m, *rest]`` to those of the result.
            of_factors: The same from factors.
        """
        results = [
            of_factors(part) if isinstance(part, Factors) else of_rows(part) for part in self.parts
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def transposed(self) -> Factored:
        """The tangents of the transposed matrix."""
        return Factored(
            [part.mT if isinstance(part, Tensor) else part.transposed() for part in self.parts]
        )

    def narrow(self, start: int, length: int) -> Factored:
        """The tangents of some of the m rows."""
        return Factored(
            [
                part.narrow(1, start, length)
                if isinstance(part, Tensor)
                else part.narrow(start, length)
                for part in self.parts
            ]
        )

    def to(self, dtype: torch.dtype) -> Factored:
        """The same in another type."""
        return Factored([part.to(dtype) for part in self.parts])


class Drawn(Deferred):
    """Tangents that are drawn again at every use.

    Args:
        draw: Returns the tangents.
        dtype: Their type.
        draw_factors: Returns them in factors, if they have some.
    """

    __slots__ = ("_draw", "_draw_factors", "_dtype")
    is_kept = False

    def __init__(
        self,
        draw: Callable[[], Tensor],
        dtype: torch.dtype,
        draw_factors: Callable[[], Factored] | None = None,
    ) -> None:
        self._draw = draw
        self._dtype = dtype
        self._draw_factors = draw_factors

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def computed(self) -> Tensor:
        return self._draw()

    def factored(self) -> Factored | None:
        return None if self._draw_factors is None else self._draw_factors()
