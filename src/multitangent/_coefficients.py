"""From directional derivatives to the coefficients of the tangents that were drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multitangent.aggregation import Aggregator
from multitangent.tangents import TangentSource


class Combination(NamedTuple):
    """Coefficients ``[K]`` or ``[K, b]`` of the drawn tangents, and what the aggregator saw."""

    coefficients: Tensor
    gram: Tensor
    jvps: Tensor


def combination(
    source: TangentSource, aggregator: Aggregator, gram: Tensor, jvps: Tensor, dimension: int
) -> Combination:
    """Let the source mix what it drew, and the aggregator combine the mixture.

    The mixed tangents are ``W = M V``: their Gram matrix is ``M G M^T``, their directional
    derivatives ``M d``, and the gradient is ``W^T c = V^T (M^T c)``.
    """
    mixing = source.mixing(gram, dimension)
    if mixing is None:
        return Combination(
            aggregator(gram, jvps, dimension=dimension, informed=source.informed), gram, jvps
        )
    mixed_gram = mixing @ gram @ mixing.mT
    mixed_jvps = _apply(mixing, jvps.double()).to(jvps.dtype)
    coefficients = aggregator(mixed_gram, mixed_jvps, dimension=dimension, informed=source.informed)
    return Combination(_apply(mixing.mT, coefficients), mixed_gram, mixed_jvps)


def _apply(matrix: Tensor, columns: Tensor) -> Tensor:
    """One matrix, or one for each sample, times ``[K]`` or ``[K, b]``."""
    if matrix.ndim == 2:
        return matrix @ columns
    return torch.einsum("bij,jb->ib", matrix, columns)
