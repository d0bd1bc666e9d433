"""What a case has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Two ways to the same values.

    Attributes:
        blocks: The names of what the case is made of.
        settings: Shapes and options, in words.
        expected: The values by plain PyTorch, by name.
        found: Those by forward mode.
        tolerance: The largest error, relative to one plus the largest value.
    """

    blocks: tuple[str, ...]
    settings: str
    expected: Callable[[], Values]
    found: Callable[[], Values]
    tolerance: float = 1e-7


def difference(expected: Values, found: Values, tolerance: float = 1e-7) -> str:
    """The first value that differs, in words."""
    if expected.keys() != found.keys():
        return f"values of {sorted(expected.keys() ^ found.keys())} on one side only"
    for name, value in expected.items():
        if value.shape != found[name].shape:
            return f"{name}: shape {list(found[name].shape)}, right {list(value.shape)}"
        error = (found[name] - value).abs()
        if not (error <= tolerance * (1 + value.abs().max() if value.numel() else 1)).all():
            where = int(error.nan_to_num(torch.inf).argmax())
            at = f"{found[name].flatten()[where]:.4g}, right {value.flatten()[where]:.4g}"
            return f"{name}: {at}"
    return ""
