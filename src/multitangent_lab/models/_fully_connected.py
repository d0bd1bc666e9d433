"""The paper's fully-connected network."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn


def fully_connected(
    image_shape: Sequence[int], num_classes: int, width: int = 256, hidden_layers: int = 2
) -> nn.Sequential:
    """Returns a fully-connected network with ReLU between its layers.

    With two hidden layers of width w and ten classes, the outputs of its linear layers, which
    activity perturbation perturbs, have the dimension n = 2w + 10.

    Args:
        image_shape: The shape of one image, `(C, H, W)`; it is flattened first.
        num_classes: The number of outputs.
        width: The width w of every hidden layer.
        hidden_layers: The number of hidden layers.

    Returns:
        `Flatten, Linear, ReLU, ..., Linear`, from images `[B, C, H, W]` to logits
        `[B, num_classes]`.

    Raises:
        ValueError: `width` or `hidden_layers` is less than one.

    Examples:
        >>> model = fully_connected((1, 28, 28), num_classes=10, width=256)
        >>> [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
        [256, 256, 10]
        >>> sum(parameter.numel() for parameter in model.parameters())
        269322

    Source: Section IV-D.
    """
    for name, value in {"width": width, "hidden_layers": hidden_layers}.items():
        if value < 1:
            raise ValueError(f"`{name}` should be at least 1. Found {value}. Try {name}=2.")
    widths = [prod(image_shape)] + [width] * hidden_layers
    hidden = [
        layer
        for inputs, outputs in pairwise(widths)
        for layer in (nn.Linear(inputs, outputs), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))
