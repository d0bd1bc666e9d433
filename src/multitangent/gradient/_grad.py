"""What becomes of a gradient: the hooks of its parameter, and ``.grad``."""

from __future__ import annotations

from torch import Tensor, nn


def hooked(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """What the hooks of a parameter make of its gradient."""
    gradient = gradient.to(parameter.dtype)
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``.grad``, as backpropagation does."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
