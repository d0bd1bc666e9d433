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
    gram, jvps, mixing = mixture(source, gram, jvps, dimension)
    coefficients = aggregator(gram, jvps, dimension=dimension, informed=source.informed)
    if mixing is not None:
        coefficients = _apply(mixing.mT, coefficients)
    return Combination(coefficients, gram, jvps)


def mixture(
    source: TangentSource, gram: Tensor, jvps: Tensor, dimension: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gram matrix and directional derivatives of what a source made of its draws, and M."""
    mixing = source.mixing(gram, dimension)
    if mixing is None:
        return gram, jvps, None
    return mixing @ gram @ mixing.mT, _apply(mixing, jvps.double()).to(jvps.dtype), mixing


def _apply(matrix: Tensor, columns: Tensor) -> Tensor:
    """One matrix, or one for each sample, times ``[K]`` or ``[K, b]``."""
    if matrix.ndim == 2:
        return matrix @ columns
    return torch.einsum("bij,jb->ib", matrix, columns)
