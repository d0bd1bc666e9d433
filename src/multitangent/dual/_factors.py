"""Tangents that are products of two thin factors, which linear functions need not multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """K tangents ``left @ right`` of a value ``[m, *rest]``, not multiplied.

    Attributes:
        left: ``[K, m, rank]``.
        right: ``[K, rank, *rest]``.

    Examples:
        >>> Factors(torch.ones(2, 3, 1), torch.ones(2, 1, 4, 5)).shape
        torch.Size([2, 3, 4, 5])
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the tangents, ``[K, m, *rest]``."""
        return self.left.shape[:2] + self.right.shape[2:]

    @property
    def dtype(self) -> torch.dtype:
        """The type of both factors."""
        return self.left.dtype

    def multiplied(self) -> Tensor:
        """The tangents themselves."""
        return (self.left @ self.right.flatten(2)).reshape(self.shape)

    def transposed(self) -> Factors:
        """The same of the transposed matrix."""
        return Factors(self.right.mT, self.left.mT)

    def narrow(self, start: int, length: int) -> Factors:
        """The same of some of the m rows."""
        return Factors(self.left.narrow(1, start, length), self.right)

    def take(self, chosen: slice) -> Factors:
        """Some of the tangents."""
        return Factors(self.left[chosen], self.right[chosen])

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another type."""
        return Factors(self.left.to(dtype), self.right.to(dtype))


Part = Tensor | Factors
