"""Products of many rows with few matrices."""

from __future__ import annotations

from torch import Tensor


def rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows ``[*losses, K]`` times matrices ``[*samples, K, L]``: ``[*losses, L]``.

    `samples` broadcasts against `losses`. No matrix is repeated.
    """
    if matrices.ndim == 2:
        return rows @ matrices
    further = rows.ndim - matrices.ndim + 1  # axes of the losses that samples do not have
    if further <= 0:
        return (rows.unsqueeze(-2) @ matrices).squeeze(-2)
    together = rows.flatten(0, further - 1).movedim(0, -2)  # [*samples, R, K]
    return (together @ matrices).movedim(-2, 0).reshape(*rows.shape[:-1], matrices.shape[-1])
