"""Guesses of the gradient, and an estimate of what they miss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._broadcast import rows_times
from multitangent.aggregation._projection import Projection

_ROUNDING = 1e-20  # of squared products
_COMMON = 0.1  # |mean m|^2 / mean |m|^2 over the samples, for want of a measurement


@dataclass(frozen=True)
class ControlVariate(Aggregator):
    """The projection onto the guesses, plus the mean of the others on what that misses.

    ``g = p + (gain / K) sum_k <v_k, m> w_k``, with p the projection of the gradient onto the span
    of the K' guesses, ``m = grad f - p`` what they miss, and w_k the part of the random tangent v_k
    outside of that span. The guesses are a control variate of the mean forward gradient: for normal
    tangents the variance is ``(n - K' + 1)/K |m|^2`` in place of ``(n + 1)/K |grad f|^2``.

    With ``gain=1`` the estimate is unbiased for normal tangents. `Projection` takes K/n of what
    the guesses miss, which is the least error for one sample, but an error with a mean: over many
    steps a bias adds up where noise averages out (``docs/guesses.md``).

    Args:
        gain: The share of the missed part that comes back in the mean, above 0 and at most 1.
            ``"auto"`` is the gain of least error for the mean of B samples, ``1 / (1 + n/(K B c))``
            for tangents of their own, if a tenth of what samples miss is common to them: c is 0.1,
            and 1/B where that is more. For random tangents that all samples share it is that of one
            sample, ``1 / (1 + n/K)``. In place of n it takes the dimension that the random tangents
            act as if they had, ``|v|^4 / <v, w>^2`` in the mean over them. So the coefficients of a
            sample depend on how many there are.

    Raises:
        ValueError: If `gain` is out of range; when called, if ``"auto"`` can not tell the dimension
            from the random tangents, such as a single one, and `dimension` is not given.

    Examples:
        The first of three tangents is a guess:

        >>> import torch
        >>> tangents = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
        >>> gram, jvps = tangents @ tangents.T, tangents @ torch.tensor([3.0, 4.0])
        >>> guesses = [True, False, False]
        >>> c = ControlVariate(gain=1.0)(gram, jvps, guesses=guesses)
        >>> c @ tangents.double()
        tensor([3., 4.], dtype=torch.float64)
    """

    gain: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.gain != "auto" and not (isinstance(self.gain, int | float) and 0 < self.gain <= 1):
            raise ValueError(
                f"`gain` should be 'auto', or above 0 and at most 1. Found {self.gain!r}."
            )

    def coefficients(self, measured: Measured) -> Tensor:
        guesses = [k for k, guess in enumerate(measured.guesses) if guess]
        random = [k for k, guess in enumerate(measured.guesses) if not guess]
        coefficients = torch.zeros_like(measured.jvps)  # [*losses, K]
        projection = self._held(measured, guesses, coefficients)
        if not random:
            return projection
        missed = measured.jvps - _along(measured.gram, projection)
        gain = self._gain(measured, random) / len(random)
        coefficients[..., random] = missed[..., random] * gain
        return coefficients + self._held(measured, guesses, coefficients)

    def _gain(self, measured: Measured, random: list[int]) -> Tensor | float:
        if self.gain != "auto":
            return self.gain
        gram = measured.take(random).gram.reshape(-1, len(random), len(random))
        shared = torch.isclose(gram, gram[:1], rtol=1e-9, atol=0).all()
        samples = torch.where(shared, 1.0, float(len(gram)))
        common = (1 / samples).clamp(min=_COMMON)
        dimension = _effective_dimension(gram, measured.dimension)
        return 1 / (1 + dimension / (len(random) * samples * common))

    def _held(self, measured: Measured, guesses: list[int], offset: Tensor) -> Tensor:
        """Coefficients of the guesses for what they hold of the gradient less ``V^T offset``."""
        coefficients = torch.zeros_like(offset)
        if guesses:
            left = replace(measured, jvps=measured.jvps - _along(measured.gram, offset))
            coefficients[..., guesses] = Projection().coefficients(left.take(guesses))
        return coefficients


def _effective_dimension(gram: Tensor, dimension: int | None) -> Tensor:
    """``(tr S)^2 / tr S^2`` of the covariance S of random tangents, from their Gram matrices.

    ``|v|^2`` has the mean tr S, and ``<v, w>^2`` of independent ones tr S^2.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    pairs = gram - torch.diag_embed(lengths)
    products = pairs.square().sum() / (len(gram) * max(lengths.shape[-1] - 1, 1))
    # Of a single tangent, of orthogonal and of zero ones there is nothing to be told.
    is_told = products > _ROUNDING * lengths.square().sum() / len(gram)
    estimate = lengths.mean().square() * lengths.shape[-1] / products
    if dimension is not None:
        return torch.where(is_told, estimate.clamp(max=dimension), float(dimension))
    if not is_told:
        raise ValueError(
            "`dimension` should be given for gain='auto' and a single random tangent, or several "
            "that are orthogonal. Found none. Try dimension=n, the number of perturbed scalars, or "
            "a number for the gain."
        )
    return estimate


def _along(gram: Tensor, coefficients: Tensor) -> Tensor:
    """The derivatives ``[*losses, K]`` that the vectors ``V^T c`` stand for."""
    return rows_times(coefficients, gram)
