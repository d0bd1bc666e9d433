"""The paper's vision transformer."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from multitangent_lab.models._transformer_block import TransformerBlock


def vision_transformer(
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    patch_size: int = 4,
    layers: int = 6,
    heads: int = 4,
    hidden: int = 256,
    mlp: int = 512,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Returns a small vision transformer, as its encoder layers in a row.

    The layers are what activity perturbation perturbs; the input part (patches, class token,
    positions) is merged into the first, the output part into the last. With the defaults their
    outputs have the dimension n = 83 210 for CIFAR-10 and 64 010 for MNIST.

    Args:
        image_size: Height and width of an image.
        in_channels: Channels of an image.
        num_classes: The number of outputs.
        patch_size: Height and width of a patch.
        layers: Encoder layers, at least 2.
        heads: Heads of attention.
        hidden: Width of a token.
        mlp: Width of the hidden layer of the perceptrons.
        dropout: Probability of dropout after attention and within the perceptrons.

    Returns:
        From images `[B, in_channels, H, W]` to logits `[B, num_classes]`.

    Raises:
        ValueError: If the patches do not tile the image, the heads do not share the width evenly,
            or there are less than two layers.

    Examples:
        >>> model = vision_transformer(image_size=28, in_channels=1)
        >>> [output.numel() for output in [model[:1](torch.zeros(1, 1, 28, 28))]]
        [12800]

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words"; Section IV-E.
    """
    if image_size % patch_size or hidden % heads or layers < 2:
        raise ValueError(
            "`patch_size` should divide `image_size`, `heads` should divide `hidden`, and `layers` "
            f"should be at least 2. Found {patch_size}, {image_size}, {heads}, {hidden}, {layers}."
        )
    tokens = (image_size // patch_size) ** 2 + 1
    encoder = [TransformerBlock(hidden, heads, mlp, dropout) for _ in range(layers)]
    first = nn.Sequential(_Patches(in_channels, patch_size, tokens, hidden), encoder[0])
    head = nn.Linear(hidden, num_classes)
    last = nn.Sequential(encoder[-1], _ClassToken(), nn.LayerNorm(hidden), head)
    parts = [first, *encoder[1:-1], last]
    return nn.Sequential(OrderedDict((f"layer{i}", p) for i, p in enumerate(parts, start=1)))


class _Patches(nn.Module):
    """The image cut into patches, as tokens with their positions, behind a class token."""

    def __init__(self, channels: int, patch_size: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, hidden, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.positions = nn.Parameter(torch.randn(1, tokens, hidden) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)
        return tokens + self.positions


class _ClassToken(nn.Module):
    """The first of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]
