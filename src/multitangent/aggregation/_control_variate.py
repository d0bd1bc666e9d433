"""Guesses of the gradient, and an estimate of what they miss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._projection import Projection


@dataclass(frozen=True)
class ControlVariate(Aggregator):
    """The projection onto the informed tangents, plus the mean of the others on what that misses.

    ``g = p + (gain / K) sum_k <v_k, m> w_k``, with p the projection of the gradient onto the span
    of the K' guesses, ``m = grad f - p`` what they miss, and w_k the part of the random tangent v_k
    outside of that span. The guesses are a control variate of the mean forward gradient: for normal
    tangents the variance is ``(n - K' + 1)/K |m|^2`` in place of ``(n + 1)/K |grad f|^2``.

    With ``gain=1`` the estimate is unbiased for normal tangents. `Projection` takes K/n of what
    the guesses miss, which is the least error for one sample, but an error with a mean: over many
    steps a bias adds up where noise averages out (``docs/informed-tangents.md``).

    Args:
        gain: The share of the missed part that comes back in the mean, above 0 and at most 1.

    Raises:
        ValueError: If `gain` is out of range.

    Examples:
        The first of three tangents is a guess:

        >>> import torch
        >>> tangents = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
        >>> gram, jvps = tangents @ tangents.T, tangents @ torch.tensor([3.0, 4.0])
        >>> informed = [True, False, False]
        >>> c = ControlVariate(gain=1.0)(gram, jvps, informed=informed)
        >>> c @ tangents.double()
        tensor([3., 4.], dtype=torch.float64)
    """

    gain: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.gain <= 1:
            raise ValueError(f"`gain` should be above 0 and at most 1. Found {self.gain!r}.")

    def _coefficients(self, measured: Measured) -> Tensor:
        guesses = [k for k, guess in enumerate(measured.informed) if guess]
        random = [k for k, guess in enumerate(measured.informed) if not guess]
        coefficients = torch.zeros_like(measured.jvps)  # [B, K]
        held = self._held(measured, guesses, coefficients)
        missed = measured.jvps - _along(measured.gram, held)
        coefficients[:, random] = missed[:, random] * (self.gain / max(len(random), 1))
        return coefficients + self._held(measured, guesses, coefficients)

    def _held(self, measured: Measured, guesses: list[int], taken: Tensor) -> Tensor:
        """Coefficients of the guesses for what they hold of the gradient less ``V^T taken``."""
        coefficients = torch.zeros_like(taken)
        if guesses:
            left = replace(measured, jvps=measured.jvps - _along(measured.gram, taken))
            coefficients[:, guesses] = Projection()._coefficients(left.take(guesses))
        return coefficients


def _along(gram: Tensor, coefficients: Tensor) -> Tensor:
    """The derivatives ``[B, K]`` that the vector ``V^T c`` stands for."""
    return (gram @ coefficients.unsqueeze(-1)).squeeze(-1)
