"""What the last step measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent.gradient._coefficients import Combination


@dataclass(frozen=True)
class Diagnostics:
    """What the last step measured, of the tangents as the aggregator saw them.

    A step that takes guesses as they are measures nothing: its numbers are not numbers.

    Attributes:
        jvps: Directional derivatives: ``[K]`` of the batch's loss, ``[K, B]`` of the samples'
            losses, or ``[K, B, T]`` of the tokens' losses.
        gram: Gram matrix in float64: ``[K, K]``, or ``[B, K, K]`` for tangents per sample. For the
            losses of tokens it is ``[T, K, K]`` or ``[B, T, K, K]``.
        gradient_norm: Norm of the estimated gradient of each loss with respect to all perturbed
            values: ``[]``, ``[B]`` or ``[B, T]``.
        fallbacks: Names of the functions that have no rule.
    """

    jvps: Tensor
    gram: Tensor
    gradient_norm: Tensor
    fallbacks: frozenset[str]

    @property
    def condition(self) -> Tensor:
        """Condition number of the Gram matrix, of the shape of `gram` but for ``K, K``."""
        if self.gram.isnan().any():  # nothing was measured
            return self.gram.new_full(self.gram.shape[:-2], torch.nan)
        values = torch.linalg.eigvalsh(self.gram).clamp(min=0)
        return values[..., -1] / values[..., 0]

    @property
    def effective_rank(self) -> Tensor:
        """``(sum of eigenvalues)^2 / sum of their squares`` of the Gram matrix.

        Of the shape of `gram` but for ``K, K``: K for orthogonal tangents of equal length, 1 for
        parallel ones.
        """
        trace = self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace.square() / self.gram.square().sum((-2, -1))


def diagnose(combined: Combination, drawn: Tensor, fallbacks: set[str]) -> Diagnostics:
    """Put together a step's combination, the Gram matrix of what was drawn, and fallbacks."""
    norm = _norm(combined.coefficients, drawn)
    return Diagnostics(combined.jvps, combined.gram, norm, frozenset(fallbacks))


def _norm(coefficients: Tensor, gram: Tensor) -> Tensor:
    """``sqrt(c^T G c)`` for coefficients ``[K, *losses]``: ``[*losses]``."""
    rows = coefficients.movedim(0, -1).unsqueeze(-2)  # [*losses, 1, K]
    return (rows @ gram @ rows.mT).clamp(min=0).sqrt().squeeze((-2, -1))
