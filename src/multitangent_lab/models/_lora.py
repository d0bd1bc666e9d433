"""Adapters of low rank beside frozen layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitangent_lab.models._transformer_block import TransformerBlock


class LoRALinear(nn.Module):
    """A linear layer plus the product of two thin matrices: ``W x + b + scale * up (down x)``.

    `up` is zero at first, so the layer computes what it did before.

    Args:
        linear: The layer, from width N to width M. Its parameters are frozen.
        rank: r, the inner width of the product.
        alpha: The product is multiplied by ``alpha / r``; ``None`` for twice the rank.

    Raises:
        ValueError: The rank is less than one.

    Examples:
        >>> layer = LoRALinear(nn.Linear(8, 3), rank=2)
        >>> {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
        {'down': (2, 8), 'up': (3, 2)}

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` should be at least 1. Found {rank}. Try 4.")
        self.linear = linear.requires_grad_(False)
        self.scale = 2.0 if alpha is None else alpha / rank
        down = torch.randn(rank, linear.in_features) / linear.in_features**0.5
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(F.linear(x, self.down), self.up)
        return self.linear(x) + self.scale * product


def add_lora(model: nn.Module, rank: int = 4, alpha: float | None = None) -> nn.Module:
    """Freezes a model and puts adapters beside the linear layers of its transformer blocks.

    The model is changed in place. Layers outside of the blocks, such as the head, get no adapter.

    Args:
        model: A model with blocks such as those of `gpt`.
        rank: r of every adapter.
        alpha: As for `LoRALinear`.

    Returns:
        The model, of which only the adapters are trainable.

    Raises:
        ValueError: The model has no transformer blocks, or the rank is less than one.

    Examples:
        >>> from multitangent_lab.models import gpt
        >>> model = add_lora(gpt(65, embedding=16, blocks=2), rank=2)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        1024
    """
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    if not blocks:
        raise ValueError(
            f"`model` should have transformer blocks. Found none in {type(model).__name__}. Try "
            "gpt(65)."
        )
    model.requires_grad_(False)
    for block in blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    setattr(parent, name, LoRALinear(layer, rank, alpha))
    return model
