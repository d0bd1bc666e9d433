"""What makes a gradient look at a batch, or at its model, anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from multitangent.objective import Batch, shapes


def kind_of(batch: Batch, modules: Sequence[nn.Module], device: torch.device) -> Any:
    """What makes a model treat a batch differently: shapes, types, its modules and modes."""
    cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    modes = tuple((module, module.training) for module in modules)
    return shapes(batch), modes, cast


def found_parameters(modules: Sequence[nn.Module]) -> list[tuple[int, bool]]:
    """What the parameters of modules are now, and which of them are trainable."""
    return [
        (id(parameter), parameter.requires_grad)
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]
