"""The forward gradient of a plain function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multitangent.aggregation import Aggregator, Projection
from multitangent.dual import DualTensor
from multitangent.engine import ForwardMode
from multitangent.gradient._arguments import check_kinds, refuse_inference_mode
from multitangent.gradient._step import Problem
from multitangent.gradient._step import step as take_step
from multitangent.objective import Batch
from multitangent.perturbation import Argument
from multitangent.tangents import Normal, Stream, TangentSource


@torch.no_grad()
def forward_gradient(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    tangents: TangentSource | None = None,
    aggregator: Aggregator | None = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """The value of a function and its forward gradient ``g = V^T c`` (Section III).

    Args:
        f: A function of one tensor that returns a scalar.
        x: Where the gradient is wanted, a floating-point tensor of any shape.
        tangents: Where the K tangents come from, ``Normal(16)`` by default.
        aggregator: How the directional derivatives are combined, ``Projection()`` by default.
        seed: The random numbers are a function of seed and step.
        step: See `seed`.

    Returns:
        The value, a scalar, and the gradient, of the shape of `x`.

    Raises:
        TypeError: If `x` is not a real floating-point tensor.
        ValueError: If the function does not return a scalar, or a value is not finite.
        RuntimeError: Inside ``torch.inference_mode()``.

    Examples:
        >>> from multitangent import Mean, Normal, Projection
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> value, gradient = forward_gradient(lambda x: (x * x).sum(), x, Normal(3), Projection())
        >>> value, gradient.round(decimals=3)
        (tensor(14.), tensor([2., 4., 6.]))
    """
    refuse_inference_mode()
    check_kinds(tangents, aggregator)
    tangents = Normal(16) if tangents is None else tangents
    if not isinstance(x, Tensor) or not x.is_floating_point():
        description = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"`x` should be a real floating-point tensor. Found {description}. Try `x.float()`."
        )
    problem = Problem(
        Argument(lambda point: _scalar(f(point), tangents)),
        tangents,
        Projection() if aggregator is None else aggregator,
        ForwardMode(micro_batch=1),
    )
    result = take_step(problem, Batch(x.detach(), None, slice(0, 1), 1), Stream(seed, step))
    return result.losses, result.values["x"]


def _scalar(value: object, tangents: TangentSource) -> Tensor:
    """A function's value, once it is one; with tangents that are zero where it is constant."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        description = (
            f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ValueError(f"`f` should return a scalar tensor. Found {description}. Try `.sum()`.")
    if not value.is_floating_point():
        raise ValueError(
            f"`f` should return a floating-point number. Found {value.dtype}. Try `.float()`."
        )
    if not value.isfinite():
        raise ValueError(f"`f` should return a finite value. Found {value.item()}.")
    if isinstance(value, DualTensor):
        return value
    return DualTensor(value.detach(), value.new_zeros(tangents.num_tangents))
