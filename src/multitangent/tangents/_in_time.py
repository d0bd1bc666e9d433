"""Tangents of a sequence, as the losses of its tokens see them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.tangents._block import Block
from multitangent.tangents._blocks import Tangents
from multitangent.tangents._rows_block import RowsBlock


class TangentsInTime:
    """The tangents V of values ``[B, T, ...]`` of a model that is causal in time.

    The loss of token s depends on the positions up to s. So its directional derivatives are the
    derivatives along V with zeros at all later positions. These vectors have the Gram matrix
    ``G_s = sum_{t<=s} V_t V_t^T``. The gradient of the loss with respect to the value at position t
    is a combination of the rows of ``V_t``, for t up to s. The gradient of the sample's loss is the
    sum over its tokens:

        ``g_t = sum_k V_t[k] sum_{s>=t} discount^(s-t) c_s[k]``.

    Args:
        tangents: V, with all of its blocks.
        num_tokens: T.
        discount: The factor, from 0 to 1, by which a loss counts less for each position before its
            own.

    Raises:
        ValueError: If the second axis of a perturbed value is not of size T.

    Examples:
        >>> from multitangent.tangents import Normal, Stream
        >>> tangents = Tangents(Normal(2), Stream(0, 0))
        >>> block = tangents.add("hidden", torch.zeros(8, 5, 3), (5, 3))
        >>> in_time = TangentsInTime(tangents, num_tokens=5)
        >>> in_time.gram().shape, in_time.dimension
        (torch.Size([5, 2, 2]), (3, 6, 9, 12, 15))
        >>> in_time.combine(torch.ones(2, 8, 5))["hidden"].shape
        torch.Size([8, 5, 3])
    """

    def __init__(self, tangents: Tangents, num_tokens: int, discount: float = 1.0) -> None:
        for name, block in tangents.blocks.items():
            _check_time(name, block, num_tokens)
        self._tangents = tangents
        self._num_tokens = num_tokens
        self._discount = discount

    @property
    def dimension(self) -> tuple[int, ...]:
        """The number of perturbed scalars that the loss of each token depends on, ``[T]``."""
        of_position = self._tangents.dimension // self._num_tokens
        return tuple(of_position * (s + 1) for s in range(self._num_tokens))

    def gram(self) -> Tensor:
        """The Gram matrices of every token in float64: ``[T, K, K]``, or ``[B, T, K, K]``."""
        k = self._tangents.num_tangents
        total = torch.zeros(1, self._num_tokens, k, k, dtype=torch.float64)
        for block in self._tangents.blocks.values():
            grams = [_gram_of_positions(rows, k) for _, rows in _pieces(block)]
            of_block = grams[0] if len(grams) == 1 else torch.cat(grams)
            total = total.to(of_block.device) + of_block
        gram = total.cumsum(1)
        return gram[0] if len(gram) == 1 else gram

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The gradients ``[B, T, ...]`` by name, from the tokens' coefficients ``[K, B, T]``."""
        weights = coefficients @ self._credit().to(coefficients)
        return {name: _combined(block, weights) for name, block in self._tangents.blocks.items()}

    def _credit(self) -> Tensor:
        """How much the loss of a token counts for a position, ``[tokens, positions]``."""
        places = torch.arange(self._num_tokens, dtype=torch.float64)
        distances = places[:, None] - places
        discount = torch.tensor(self._discount, dtype=torch.float64)
        return torch.where(distances >= 0, discount ** distances.clamp(min=0), 0.0)


def _check_time(name: str, block: Block, num_tokens: int) -> None:
    shape = block.request.shape
    if shape[:1] != (num_tokens,):
        raise ValueError(
            "`sites` should have outputs [B, T, ...] for `Activations(credit='token')`, where the "
            f"losses are [B, {num_tokens}]. Found shape {[block.request.batch, *shape]} at "
            f"{name!r}. Try `Activations(sites=[...])` with modules whose outputs are, or "
            "`credit='sample'`."
        )


def _pieces(block: Block) -> Iterator[tuple[slice, Tensor]]:
    """The tangents ``[at most K, 1 or b, T, ...]`` of some samples at a time, and whose."""
    if isinstance(block, RowsBlock):
        yield from block.pieces()
    else:
        yield slice(None), block.rows()


def _gram_of_positions(rows: Tensor, num_tangents: int) -> Tensor:
    """``V_t V_t^T`` in float64 for tangents ``[at most K, 1 or b, T, ...]``: ``[b, T, K, K]``."""
    ordered = rows.to(torch.float64, memory_format=torch.contiguous_format)
    vectors = ordered.reshape(len(rows), rows.shape[1] * rows.shape[2], -1).transpose(0, 1)
    gram = (vectors @ vectors.mT).view(*rows.shape[1:3], len(rows), len(rows))
    missing = num_tangents - len(rows)
    return F.pad(gram, (0, missing, 0, missing)) if missing else gram


def _combined(block: Block, weights: Tensor) -> Tensor:
    """The sums over k of tangents at every position times their weights ``[K, B, T]``."""
    shape = block.request.shape
    combined = []
    for samples, tangents in _pieces(block):
        rows = tangents.reshape(*tangents.shape[:3], prod(shape[1:])).to(block.request.dtype)
        here = weights[: len(rows), samples].to(rows.dtype)
        if rows.shape[1] == 1:
            of_positions = here.permute(2, 1, 0) @ rows[:, 0].transpose(0, 1)  # [T, B, ...]
            combined.append(of_positions.transpose(0, 1))
        else:
            total = torch.zeros_like(rows[0])
            for row, weight in zip(rows, here, strict=True):
                total.addcmul_(row, weight.unsqueeze(-1))
            combined.append(total)
    joined = combined[0] if len(combined) == 1 else torch.cat(combined)
    return joined.reshape(-1, *shape)
