"""Tangents of one matrix that are held in factors: their full rows are never made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual import Deferred, Drawn, Factored, Part
from multitangent.tangents._block import Block
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource


class FactoredBlock(Block):
    """The tangents of a value ``[m, *rest]``, some or all of them products ``left @ right``.

    With ``n = prod(rest)`` the K tangents take ``K rank (m + n)`` numbers in place of ``K m n``,
    and so does what is computed with them.

    Args:
        source: Where they come from.
        request: What is drawn.
        dtype: The type in which factors are carried, by default that of the perturbed value.
        store: Whether factors are kept from the first use on, or drawn again at every use.
    """

    def __init__(
        self,
        source: TangentSource,
        request: Request,
        dtype: torch.dtype | None = None,
        *,
        store: bool = True,
    ) -> None:
        super().__init__(source, request, dtype)
        self.is_stored = store
        self._kept: Factored | None = None

    def factored(self) -> Factored:
        """The tangents in factors.

        Raises:
            ValueError: If the source returns another shape or type.
        """
        if self._kept is not None:
            return self._kept
        drawn = self.source.draw_factors(self.request)
        self._check(drawn)
        drawn = drawn.to(self.dtype)
        if self.is_stored:
            self._kept = drawn
        return drawn

    def deferred(self) -> Deferred:
        """What a dual tensor holds in place of its tangents."""
        if self.is_stored:
            return self.factored()
        return Drawn(lambda: self.factored().computed(), self.dtype, self.factored)

    def rows(self, samples: slice | None = None) -> Tensor:
        return self.factored().computed().unsqueeze(1)

    def row(self, k: int, samples: slice | None = None) -> Tensor | None:
        factored = self.factored()
        return factored.take(range(k, k + 1)).computed() if k < len(factored) else None

    def gram(self) -> Tensor:
        parts = [part.to(torch.float64) for part in self.factored().parts]
        gram = torch.cat([torch.cat([_inner(a, b) for b in parts], 1) for a in parts])
        missing = self.num_tangents - len(gram)
        return F.pad(gram, (0, missing, 0, missing)).unsqueeze(0)

    def apply(self, gradient: Tensor) -> Tensor:
        dtype = _precise(gradient.dtype)
        factored, rows = self.factored(), gradient.to(dtype)
        jvps = torch.cat([_inner(part.to(dtype), rows) for part in factored.parts])
        return F.pad(jvps, (0, 0, 0, self.num_tangents - len(jvps)))

    def combine(self, coefficients: Tensor) -> Tensor:
        dtype = _precise(self.request.dtype)
        weights, total = coefficients.flatten(1).to(dtype), None
        for part in self.factored().parts:
            here, weights = weights[: part.shape[0]], weights[part.shape[0] :]
            term = _combined(part.to(dtype), here)
            total = term if total is None else total.add_(term)
        assert total is not None
        shape = *coefficients.shape[1:], *self.request.shape
        return total.reshape(shape).to(self.request.dtype)

    def _check(self, drawn: object) -> None:
        wanted, dtype = self.request.shape, self.request.dtype
        fewest = 1 if any(self.source.guesses) else self.num_tangents
        if not isinstance(drawn, Factored):
            description = type(drawn).__name__
        elif (
            all(part.shape[1:] == wanted and part.dtype == dtype for part in drawn.parts)
            and fewest <= len(drawn) <= self.num_tangents
        ):
            return
        else:
            description = f"{[list(part.shape) for part in drawn.parts]} of {drawn.dtype}"
        raise ValueError(
            f"`draw_factors` of {self.source!r} should return Factored tangents of shape "
            f"{[self.num_tangents, *wanted]} of {dtype} in all. Found {description}."
        )


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken."""
    return torch.promote_types(dtype, torch.float32)


def _inner(a: Part, b: Part) -> Tensor:
    """The inner products of tangents ``[k, m, *rest]`` and ``[l, m, *rest]``, ``[k, l]``."""
    if isinstance(a, Tensor):
        return a.flatten(1) @ b.flatten(1).mT if isinstance(b, Tensor) else _inner(b, a).mT
    (k, m, rank), right = a.left.shape, a.right.flatten(2).flatten(0, 1)
    if isinstance(b, Tensor):
        through = b.flatten(2) @ right.mT  # [l, m, k rank]
        return torch.einsum("lmkr,kmr->kl", through.view(len(b), m, k, rank), a.left)
    (length, _, other_rank), other = b.left.shape, b.right.flatten(2).flatten(0, 1)
    lefts = a.left.mT.flatten(0, 1) @ b.left.mT.flatten(0, 1).mT
    return (lefts * (right @ other.mT)).view(k, rank, length, other_rank).sum((1, 3))


def _combined(part: Part, weights: Tensor) -> Tensor:
    """The sums over k of tangents ``[k, m, *rest]`` times weights ``[k, L]``: ``[L, m n]``."""
    if isinstance(part, Tensor):
        return weights.mT @ part.flatten(1)
    left = (weights.mT[:, :, None, None] * part.left).transpose(1, 2).flatten(2)  # [L, m, K rank]
    return (left @ part.right.flatten(2).flatten(0, 1)).flatten(1)
