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
    shared = [axis for axis, size in enumerate(positions(shape)) if size != shape[axis]]
    return squares.mean(shared, keepdim=True) if shared else squares


def positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `mean_square` returns for values of a shape."""
    if len(shape) == 3:
        return 1, *shape[1:]
    if len(shape) == 2:
        return shape[0], 1
    return (1,) * len(shape)
