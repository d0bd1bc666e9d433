"""The paper's residual network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

Norm = Literal["batch", "group"]


def resnet18(in_channels: int = 3, num_classes: int = 10, norm: Norm = "batch") -> nn.Sequential:
    """Returns ResNet18, as six parts in a row: stem, four stages, head.

    The parts are what activity perturbation perturbs. For images of 32x32 pixels and ten classes
    their outputs have the dimension n = 11 786, for 28x28 it is 9 866.

    Args:
        in_channels: Channels of an image.
        num_classes: The number of outputs.
        norm: Batch normalisation, as in the paper, or group normalisation of eight channels a
            group, which leaves the samples independent.

    Returns:
        From images `[B, in_channels, H, W]` to logits `[B, num_classes]`.

    Raises:
        ValueError: `norm` is unknown.

    Examples:
        >>> sum(parameter.numel() for parameter in resnet18().parameters())
        11181642

    Source: He et al., "Deep Residual Learning for Image Recognition", Table 1; Section IV-E.
    """
    known: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(channels // 8, channels),
    }
    if norm not in known:
        raise ValueError(f"`norm` should be one of {list(known)}. Found {norm!r}.")
    normalization = known[norm]
    stem = nn.Sequential(
        nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False),
        normalization(64),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    widths = [64, 64, 128, 256, 512]
    stages = {
        f"stage{i}": nn.Sequential(
            _Block(widths[i - 1], widths[i], 1 if i == 1 else 2, normalization),
            _Block(widths[i], widths[i], 1, normalization),
        )
        for i in range(1, 5)
    }
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))
    return nn.Sequential(OrderedDict(stem=stem, **stages, head=head))


class _Block(nn.Module):
    """Two convolutions, and a shortcut past them."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, normalization: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = normalization(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = normalization(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), normalization(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(h)) + self.shortcut(x)).relu()
