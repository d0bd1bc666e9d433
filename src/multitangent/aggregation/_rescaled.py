"""A gradient at its expected length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured


@dataclass(frozen=True)
class Rescaled(Aggregator):
    """``s(K, n)`` times another aggregator, such that ``E |g|^2 = |grad f|^2``.

    For independent normal tangents the squared length of the mean is (n + K + 1)/K times that of
    the gradient, of the sum K^2 times that, of the projection K/n (for K < n).

    Args:
        inner: The aggregator whose length is corrected.

    Raises:
        NotImplementedError: When called, if the expected length of `inner` has no closed form.
        ValueError: When called, if the dimension n is not given.

    Examples:
        >>> import torch
        >>> from multitangent import Mean
        >>> Rescaled(Mean())(torch.eye(1), torch.ones(1), dimension=2)
        tensor([0.5000], dtype=torch.float64)
    """

    inner: Aggregator

    def coefficients(self, measured: Measured) -> Tensor:
        if measured.dimension is None:
            raise ValueError("`dimension` should be given for `Rescaled`. Found None.")
        count = measured.jvps.shape[-1]
        expected = self.inner.expected_squared_norm(count, measured.dimension)
        return self.inner.coefficients(measured) / expected**0.5

    def expected_squared_norm(self, num_tangents: int, dimension: int) -> float:
        return 1.0

    def expected_alignment(self, num_tangents: int, dimension: int) -> float:
        alignment = self.inner.expected_alignment(num_tangents, dimension)
        return alignment / self.inner.expected_squared_norm(num_tangents, dimension) ** 0.5
