"""The block that transformers repeat."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a normalisation and beside a shortcut.

    Args:
        hidden: Width D of a token.
        heads: Heads of attention, which share the width evenly.
        mlp: Width of the hidden layer of the perceptron.
        dropout: Probability of dropout after attention and within the perceptron.
        causal: Whether a token attends to itself and earlier tokens only.

    Examples:
        >>> import torch
        >>> block = TransformerBlock(8, heads=2, mlp=16, causal=True).eval()
        >>> x = torch.randn(1, 5, 8)
        >>> torch.allclose(block(x)[:, :3], block(x[:, :3]), atol=1e-6)
        True

    Source: Vaswani et al., "Attention Is All You Need"; normalisation in front as in Xiong et al.,
    "On Layer Normalization in the Transformer Architecture".
    """

    def __init__(
        self, hidden: int, heads: int, mlp: int, dropout: float = 0.0, *, causal: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.project = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, mlp),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp, hidden),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.project(self._attend(self.norm1(x))))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(x).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return attended.transpose(1, 2).flatten(2)
