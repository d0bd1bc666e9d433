"""Adapters of low rank beside frozen linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """A frozen linear layer, and beside it a product of two thin matrices that is trained.

    The output is ``base(x) + scale x A^T B^T`` with ``A [rank, in]`` and ``B [out, rank]``. B
    begins as zero, so that the model is unchanged at first.

    Args:
        base: The layer, whose parameters are frozen.
        rank: The rank of the product.
        scale: The factor of the product.

    Examples:
        >>> layer, x = nn.Linear(6, 4), torch.randn(2, 6)
        >>> adapted = LowRankAdapter(layer, rank=2)
        >>> torch.equal(adapted(x), layer(x))
        True
        >>> [name for name, p in adapted.named_parameters() if p.requires_grad]
        ['down', 'up']

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        like = base.weight
        self.down = nn.Parameter(like.new_empty(rank, base.in_features))
        self.up = nn.Parameter(like.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def add_low_rank_adapters(
    model: nn.Module, rank: int, layers: Sequence[str] = ("query_key_value",)
) -> None:
    """Freeze a model, and put adapters beside its linear layers of some names.

    Args:
        model: The model, which is changed.
        rank: The rank of every adapter.
        layers: The last parts of the layers' names. The default is what LoRA adapts in GPT-2 as a
            rule, the queries, keys and values.

    Raises:
        ValueError: If no linear layer has such a name.

    Examples:
        >>> from multitangent_lab.models import gpt
        >>> model = gpt(num_tokens=65)
        >>> add_low_rank_adapters(model, rank=4)
        >>> sum(p.requires_grad for p in model.parameters())
        8
    """
    model.requires_grad_(False)
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if name in layers and isinstance(child, nn.Linear)
    ]
    if not found:
        raise ValueError(
            f"`layers` should name linear layers of the model. Found none called {list(layers)}."
        )
    for module, name, child in found:
        setattr(module, name, LowRankAdapter(child, rank))
