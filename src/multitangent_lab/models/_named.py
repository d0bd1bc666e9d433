"""The paper's networks by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from multitangent_lab.models._fully_connected import fully_connected
from multitangent_lab.models._resnet import resnet18
from multitangent_lab.models._vision_transformer import vision_transformer


def build_model(
    name: str,
    image_shape: Sequence[int],
    num_classes: int = 10,
    *,
    width: int = 256,
    hidden_layers: int = 2,
) -> nn.Sequential:
    """Returns a network of the paper for images of some shape.

    Args:
        name: `"fc"`, `"resnet18"` or `"vit"`.
        image_shape: `(C, H, W)`.
        num_classes: The number of outputs.
        width: The width of the hidden layers of `"fc"`.
        hidden_layers: How many hidden layers `"fc"` has, two in the paper.

    Returns:
        From images `[B, C, H, W]` to logits `[B, num_classes]`.

    Raises:
        ValueError: The name is unknown, or the network does not take such images.

    Examples:
        >>> [len(build_model(name, (1, 28, 28))) for name in ("fc", "resnet18", "vit")]
        [6, 6, 6]
    """
    channels, height, across = image_shape
    if name == "fc":
        return fully_connected(image_shape, num_classes, width, hidden_layers)
    if name == "resnet18":
        return resnet18(channels, num_classes)
    if name != "vit":
        raise ValueError(f"`name` should be one of fc, resnet18, vit. Found {name!r}. Try 'fc'.")
    if height != across:
        raise ValueError(
            f"`image_shape` should be square for vit. Found {tuple(image_shape)}. Try 'resnet18'."
        )
    return vision_transformer(height, channels, num_classes)
