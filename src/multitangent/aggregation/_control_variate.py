"""Guesses of the gradient, and an estimate of what they miss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._projection import Projection


@dataclass(frozen=True)
class ControlVariate(Aggregator):
    """The projection onto the informed tangents, plus the mean of the others on what that misses.

    ``g = p + (gain / K) sum_k <v_k, grad f - p> v_k``, with p the projection of the gradient onto
    the span of the K' guesses, and the sum over the K random tangents. The guesses are a control
    variate of the mean forward gradient: its variance is ``(n + 1)/K |grad f - p|^2`` in place
    of ``(n + 1)/K |grad f|^2``.

    With ``gain=1`` the estimate is unbiased for normal tangents. `Projection` takes K/n of what
    the guesses miss, which is the least error for one sample, but an error with a mean: over many
    steps a bias adds up where noise averages out. Between the two, the expected squared error of a
    batch of B samples with tangents of their own is least for
    ``gain = 1 / (1 + n / (K B k))``, with k the share of the missed part that the samples have
    in common (Section "Why not the projection alone" of ``docs/informed-tangents.md``).

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
        if guesses:
            coefficients[:, guesses] = Projection()._coefficients(measured.take(guesses))
        along_guesses = (measured.gram @ coefficients.unsqueeze(-1)).squeeze(-1)
        missed = (measured.jvps - along_guesses)[:, random]
        coefficients[:, random] = missed * (self.gain / max(len(random), 1))
        return coefficients
