"""What the mean of several estimates says of their bias, and of their noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Products:
    """Products of N estimates ``g_1 ... g_N`` with the true gradient g and with themselves.

    The products of two groups of parameters add up to the products of both together.

    Attributes:
        count: N.
        along: ``<m, g>``, with m the mean of the estimates.
        mean: ``|m|^2``.
        true: ``|g|^2``.
        estimates: ``sum_i |g_i|^2``.

    Examples:
        Two estimates with the mean (1, 0) and noise of length 1 each; the true gradient is (1, 1):

        >>> found = Products(count=2, along=1.0, mean=1.0, true=2.0, estimates=4.0)
        >>> round(found.cosine, 3), found.variance, found.limit is None
        (0.707, 2.0, True)
    """

    count: int
    along: float
    mean: float
    true: float
    estimates: float

    @property
    def cosine(self) -> float:
        """The cosine of m and g; 0 where one of them is zero."""
        length = (self.mean * self.true) ** 0.5
        return self.along / length if length > 0 else 0.0

    @property
    def variance(self) -> float | None:
        """An unbiased estimate of ``E |g_i - E g_i|^2``; ``None`` for a single estimate."""
        if self.count == 1:
            return None
        return max(self.estimates - self.count * self.mean, 0.0) / (self.count - 1)

    @property
    def limit(self) -> float | None:
        """The limit of the cosine of m and g for large N: the cosine of ``E g_i`` and g.

        ``E <m, g> = <E g_i, g>``, but ``E |m|^2 = |E g_i|^2 + variance / N``: noise makes the mean
        longer and its cosine smaller. Without the noise's share the cosine is
        ``<m, g> / (|g| sqrt(|m|^2 - variance / N))``. The value under the root is the mean of
        ``<g_i, g_j>`` for all ``i != j``.

        The limit is ``None`` for a single estimate, and where noise alone could explain
        ``|m|^2``.
        """
        if self.variance is None:
            return None
        if self.variance <= _ROUNDING * self.mean:
            return self.cosine
        signal = self.mean - self.variance / self.count
        if signal <= 0 or self.true == 0:
            return None
        return max(-1.0, min(1.0, self.along / (signal * self.true) ** 0.5))


_ROUNDING = 1e-20


class Sums:
    """Sums of estimates. They take one tensor for each parameter, for any number of estimates.

    Args:
        true: The true gradients. Parameters without one do not count.
    """

    def __init__(self, true: Mapping[nn.Parameter, Tensor]) -> None:
        self._true = true
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[nn.Parameter, float] = {}
        self.count = 0

    def add(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add one estimate, which has the same parameters as those before."""
        for parameter, gradient in gradients.items():
            if parameter in self._true:
                value = gradient.double()
                square = float(value.square().sum())
                self._squares[parameter] = self._squares.get(parameter, 0.0) + square
                before = self._sums.get(parameter)
                self._sums[parameter] = value.clone() if before is None else before.add_(value)
        self.count += 1

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that have both an estimate and a true gradient."""
        return self._sums.keys()

    def products(self, parameters: Iterable[nn.Parameter]) -> Products:
        """The products over some parameters; those without an estimate do not count."""
        along = mean = true = estimates = 0.0
        for parameter in parameters:
            if parameter in self._sums:
                average = self._sums[parameter] / self.count
                expected = self._true[parameter].to(torch.float64)
                along += float((average * expected).sum())
                mean += float(average.square().sum())
                true += float(expected.square().sum())
                estimates += self._squares[parameter]
        return Products(self.count, along, mean, true, estimates)
