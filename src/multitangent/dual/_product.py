"""Tangents that are multiplied and added up only when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

import torch
from torch import Tensor

from multitangent.dual._deferred import Deferred

_MOST_TERMS = 4  # of one sum that is not computed yet: all their tangents are kept until then

Factor = Tensor | float | None


class Product(Deferred):
    """A sum of tangents ``[K, *shape]`` times factors, not computed yet.

    A derivative that the next function can take along costs no pass of its own over K tensors, and
    a sum over axes becomes a matrix product.

    Args:
        tangents: ``[K, *shape]``, axes of size 1 where constant.
        factor: ``[*shape]``, or what broadcasts with it; a tensor that nobody else writes into, a
            number, or ``None`` for 1.
    """

    __slots__ = ("terms",)

    def __init__(self, tangents: Tensor, factor: Factor = None) -> None:
        self.terms: tuple[tuple[Tensor, Factor], ...] = ((tangents, factor),)

    @classmethod
    def _of(cls, terms: Sequence[tuple[Tensor, Factor]]) -> Product:
        product = cls.__new__(cls)
        product.terms = tuple(terms)
        return product

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tangents."""
        return self.terms[0][0].dtype

    def times(self, factor: Tensor | float) -> Product:
        """The same, times a factor."""
        return self._of(
            [(t, factor if weight is None else weight * factor) for t, weight in self.terms]
        )

    def plus(self, other: Product) -> Product | None:
        """The sum, ``None`` if it can not wait."""
        rows = {len(t) for t, _ in (*self.terms, *other.terms)}
        kinds = {t.dtype for t, _ in (*self.terms, *other.terms)}
        if len(rows) > 1 or len(kinds) > 1:
            return None
        terms = list(self.terms)
        for t, factor in other.terms:
            for i, (tensor, weight) in enumerate(terms):
                if tensor is t:
                    terms[i] = (
                        t,
                        (1 if weight is None else weight) + (1 if factor is None else factor),
                    )
                    break
            else:
                terms.append((t, factor))
        return self._of(terms) if len(terms) <= _MOST_TERMS else None

    def computed(self) -> Tensor:
        """The tangents, in the type in which they are carried.

        Factors are rounded to that type, so that nothing of K tensors is made in another.
        """
        (tangents, factor), *others = [
            (t, carried(factor, self.dtype) if isinstance(factor, Tensor) else factor)
            for t, factor in self.terms
        ]
        total = tangents if factor is None else tangents * factor
        for t, factor in others:
            if isinstance(factor, Tensor):
                total = torch.addcmul(total, t, factor)
            else:
                total = torch.add(total, t, alpha=1 if factor is None else factor)
        return carried(total, self.dtype)

    def summed(self, shape: Sequence[int], axes: Sequence[int], keepdim: bool) -> Tensor:
        """The tangents of the sum of a value of that shape over axes, by matrix products."""
        letters = ascii_letters[: len(shape)]
        kept = "".join(c for axis, c in enumerate(letters) if axis not in axes)
        total: Tensor | None = None
        for t, factor in self.terms:
            if isinstance(factor, Tensor):
                # An axis along which tangents are constant is one of rows, not of matrices.
                varying = [axis for axis, size in enumerate(t.shape[1:]) if size != 1]
                rows = t.reshape(len(t), *[t.shape[axis + 1] for axis in varying])
                indices = "".join(letters[axis] for axis in varying)
                weights = factor.to(t.dtype).expand(shape)
                term = torch.einsum(f"Z{indices},{letters}->Z{kept}", rows, weights)
            else:
                sizes = [size if axis in axes else -1 for axis, size in enumerate(shape)]
                term = t.expand(-1, *sizes).sum([axis + 1 for axis in axes])
                term = term if factor is None else term * factor
            total = term if total is None else total + term
        assert total is not None
        if keepdim:
            for axis in sorted(axes):
                total = total.unsqueeze(axis + 1)
        return total


def carried(tangents: Tensor, dtype: torch.dtype) -> Tensor:
    """Tangents in the type in which they are carried."""
    return tangents if tangents.dtype is dtype else tangents.to(dtype)
