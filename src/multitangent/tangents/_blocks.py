"""The K tangents V, held as named blocks and never put together."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Tangents:
    """V: K vectors whose blocks ``[K, 1 or b, *shape]`` are added site by site.

    Examples:
        >>> tangents = Tangents()
        >>> tangents.add("hidden", torch.ones(2, 1, 3))
        >>> tangents.gram()
        tensor([[3., 3.],
                [3., 3.]], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def add(self, name: str, block: Tensor) -> None:
        """Add the block of one site."""
        self.blocks[name] = block

    @property
    def dimension(self) -> int:
        """n: the number of perturbed scalars, per sample for activations."""
        return sum(prod(block.shape[2:]) for block in self.blocks.values())

    def gram(self) -> Tensor:
        """``V V^T`` in float64, the sum over the blocks: ``[K, K]``, or ``[b, K, K]``."""
        total: Tensor | float = 0.0
        for block in self.blocks.values():
            rows = (
                block.flatten(2).transpose(0, 1).double()
                if block.ndim > 2
                else (block.transpose(0, 1).unsqueeze(-1).double())
            )  # [1 or b, K, n]
            total = total + rows @ rows.mT
        assert isinstance(total, Tensor)
        return total[0] if total.shape[0] == 1 else total

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``g = V^T c`` for coefficients ``[K, b]``, block by block: ``[b, *shape]``."""
        gradient = {}
        for name, block in self.blocks.items():
            rows = block.reshape(*block.shape[:2], -1)  # [K, 1 or b, n]
            weights = coefficients.to(rows.dtype)
            if rows.shape[1] == 1:
                combined = weights.mT @ rows[:, 0]
            else:
                combined = torch.einsum("kb,kbn->bn", weights, rows)
            gradient[name] = combined.reshape(-1, *block.shape[2:])
        return gradient
