"""How large values are at each position of a site."""

from __future__ import annotations

from torch import Tensor


def mean_square(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mean squared entry at every position, for values ``[..., *shape]``.

    A position is a cell of a feature map ``[C, H, W]``, where the channels share one number, and a
    token of a sequence ``[T, D]``; any other value has a single one. Shapes do not say what an axis
    means: maps of one axis, ``[C, L]``, are taken for sequences.

    Returns:
        A tensor that broadcasts against `shape`.
    """
    squares = values.double().square().reshape(-1, *shape).mean(0)
    if len(shape) == 3:
        return squares.mean(0, keepdim=True)
    if len(shape) == 2:
        return squares.mean(1, keepdim=True)
    return squares.mean().reshape([1] * len(shape))
