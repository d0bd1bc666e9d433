"""From directional derivatives to the coefficients of the tangents that were drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multitangent._deferred_checks import are_finite
from multitangent._errors import NonFiniteError
from multitangent.aggregation import Aggregator, SumOfGuesses, rows_times
from multitangent.tangents import Tangents, TangentSource


class Combination(NamedTuple):
    """Coefficients ``[K, *losses]`` of the drawn tangents, and what the aggregator saw."""

    coefficients: Tensor
    gram: Tensor
    jvps: Tensor


def combine(
    source: TangentSource,
    aggregator: Aggregator,
    gram: Tensor,
    jvps: Tensor,
    dimension: int | Sequence[int],
    precision: float | None = None,
) -> Combination:
    """Let the source mix what it drew, and the aggregator combine the mixture.

    The mixed tangents are ``W = M V``: their Gram matrix is ``M G M^T``, their directional
    derivatives ``M d``, and the gradient is ``W^T c = V^T (M^T c)``.

    Where every token (the last axis of the losses) has a dimension of its own, each token has its
    own mixture and its own call of the aggregator, since its tangents end at its position.
    """
    if not isinstance(dimension, int):
        return _stacked(
            [
                combine(source, aggregator, gram[..., s, :, :], jvps[..., s], here, precision)
                for s, here in enumerate(dimension)
            ]
        )
    if dimension == 0:  # nothing is perturbed, so there is nothing to combine
        return Combination(torch.zeros_like(jvps, dtype=gram.dtype), gram, jvps)
    mixing = source.mixing(gram, dimension)
    if mixing is not None:
        gram = mixing @ gram @ mixing.mT
        jvps = _apply(mixing, jvps.double()).to(jvps.dtype)
    coefficients = aggregator(
        gram, jvps, dimension=dimension, guesses=source.guesses, precision=precision
    )
    if mixing is not None:
        coefficients = _apply(mixing.mT, coefficients)
    return Combination(coefficients, gram, jvps)


def sum_of_guesses(tangents: Tangents, jvps: Tensor) -> tuple[Combination, dict[str, Tensor]]:
    """The combination in which every guess counts once, and the gradients that it gives.

    No Gram matrix is computed: in its place there is "not a number".

    Raises:
        ValueError: If there is no guess, or a guess is not finite.
    """
    guesses = tangents.guesses
    coefficients = SumOfGuesses().of_guesses(guesses, jvps)
    gradients = tangents.total([k for k, guess in enumerate(guesses) if guess], jvps.shape[1:])
    if not are_finite(*gradients.values()):
        name = next(n for n, gradient in gradients.items() if not gradient.isfinite().all())
        raise NonFiniteError(
            f"The guesses of the gradient should be finite. Found values at {name!r} that are "
            "infinite or not a number. Try a lower learning rate, or look for the layer whose "
            "output is not finite."
        )
    unknown = coefficients.new_full((len(guesses), len(guesses)), math.nan)
    return Combination(coefficients, unknown, jvps), gradients


def _stacked(of_tokens: Sequence[Combination]) -> Combination:
    """The combinations of all tokens as one, with the tokens in the last axis."""
    coefficients, grams, jvps = zip(*of_tokens, strict=True)
    return Combination(torch.stack(coefficients, -1), torch.stack(grams, -3), torch.stack(jvps, -1))


def _apply(matrix: Tensor, columns: Tensor) -> Tensor:
    """Matrices ``[*samples, K, K]`` times ``[K, *losses]``."""
    if matrix.ndim == 2:
        return torch.tensordot(matrix, columns, 1)
    return rows_times(columns.movedim(0, -1), matrix.mT).movedim(-1, 0)
