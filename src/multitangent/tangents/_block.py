"""The tangents of one site: what is computed with them, however they are held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource


class Block(ABC):
    """The tangents of one site, and what is computed with them.

    Args:
        source: Where they come from.
        request: What is drawn.
        dtype: The type in which tangents are carried, by default that of the perturbed value.

    Attributes:
        is_stored: Whether the tangents are kept from the first use on.
        may_be_unused: Whether the tangents should wait for their first use.
    """

    is_stored: bool
    may_be_unused = False

    def __init__(
        self, source: TangentSource, request: Request, dtype: torch.dtype | None = None
    ) -> None:
        self.request = request
        self.num_tangents = source.num_tangents
        self.dtype = request.dtype if dtype is None else dtype
        self.source = source

    @property
    def dimension(self) -> int:
        """The number of perturbed scalars, per sample for activations."""
        return prod(self.request.shape)

    def with_output(self, output: Tensor, output_gradient: Tensor) -> None:
        """Add the model's output to what the source knows, before the first use."""
        self.request = replace(self.request, output=output, output_gradient=output_gradient)

    def with_last_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of the last perturbed value to that, before the first use."""
        self.request = replace(self.request, last_gradient=gradient)

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
    def gram(self) -> Tensor:
        """``V V^T`` of this block in float64, ``[1 or b, K, K]``."""

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """``V g``, the directional derivatives ``[K, b]`` for gradients ``[b, *shape]``."""

    def total(self, chosen: Sequence[int], losses: Sequence[int]) -> Tensor:
        """The sum of some tangents, for losses of that shape: ``[*losses, *shape]``."""
        columns = losses or (1,)
        coefficients = torch.zeros(self.num_tangents, *columns, device=self.request.device)
        coefficients[list(chosen)] = 1.0
        total = self.combine(coefficients)
        return total if losses else total[0]

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """``V^T c`` for coefficients ``[K, *losses]``, the gradients ``[*losses, *shape]``.

        Where each sample has tangents of its own, the samples are the last axis of the losses.
        """
