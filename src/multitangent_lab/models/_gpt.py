"""A small language model."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from multitangent_lab.models._transformer_block import TransformerBlock


def gpt(
    num_tokens: int,
    context: int = 64,
    *,
    embedding: int = 128,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
    tied: bool = False,
) -> nn.Sequential:
    """Returns a causal transformer, as its blocks in a row.

    The blocks are what activity perturbation perturbs. The tokens' embedding and their positions
    are merged into the first, the last normalisation and the head into the last. With T tokens of
    width D and V possible tokens their outputs have the dimension n = (blocks - 1) T D + T V.

    Args:
        num_tokens: V, how many tokens there are.
        context: T, how many tokens the model sees at most.
        embedding: D, the width of a token.
        blocks: How many blocks, at least 2.
        heads: Heads of attention in every block.
        dropout: Probability of dropout after attention and within the perceptrons.
        tied: Whether the head has the same weight as the embedding of the tokens, and no bias.

    Returns:
        From tokens `[B, T]`, or fewer than T, to the logits of each one's successor `[B, T, V]`.

    Raises:
        ValueError: The heads do not share the width evenly, there are less than two blocks, or a
            number is less than one.

    Examples:
        >>> model = gpt(num_tokens=65)
        >>> model(torch.zeros(2, 64, dtype=torch.int64)).shape
        torch.Size([2, 64, 65])
        >>> [name for name, _ in model.named_children()]
        ['block1', 'block2', 'block3', 'block4']

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners".
    """
    if min(num_tokens, context, embedding, heads) < 1 or blocks < 2 or embedding % heads:
        raise ValueError(
            "`heads` should divide `embedding`, `blocks` should be at least 2, and all numbers at "
            f"least 1. Found heads={heads}, embedding={embedding}, blocks={blocks}, "
            f"num_tokens={num_tokens}, context={context}. Try the defaults, gpt({num_tokens})."
        )
    first, *between, last = (
        TransformerBlock(embedding, heads, 4 * embedding, dropout, causal=True)
        for _ in range(blocks)
    )
    tokens = _Tokens(num_tokens, context, embedding)
    head = nn.Linear(embedding, num_tokens, bias=not tied)
    if tied:
        head.weight = tokens.embed.weight
    parts = [
        nn.Sequential(tokens, first),
        *between,
        nn.Sequential(last, nn.LayerNorm(embedding), head),
    ]
    return nn.Sequential(OrderedDict((f"block{i}", part) for i, part in enumerate(parts, start=1)))


class _Tokens(nn.Module):
    """The tokens as vectors, each with its position added."""

    def __init__(self, num_tokens: int, context: int, embedding: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_tokens, embedding)
        self.positions = nn.Parameter(torch.randn(1, context, embedding) * 0.02)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.positions[:, : tokens.shape[1]]
