"""The forward gradient of a plain function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multitangent._coefficients import combination
from multitangent._estimator import check_kinds, refuse_inference_mode
from multitangent.aggregation import Aggregator, Projection
from multitangent.dual import DualTensor
from multitangent.tangents import Block, Normal, Request, Stream, Tangents, TangentSource


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
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"`x` should be a real floating-point tensor. Found {found}. Try `x.float()`."
        )
    source = Normal(16) if tangents is None else tangents
    aggregator = Projection() if aggregator is None else aggregator
    point = x.detach()
    request = Request(
        Stream(seed, step), 0, tuple(x.shape), None, 0, x.dtype, x.device, primal=point
    )
    drawn = Tangents()
    block = Block(source, request, store=True)
    drawn.add("x", block)
    out = f(DualTensor(point, block.rows()[:, 0]))
    if not isinstance(out, Tensor) or out.ndim != 0:
        found = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"`f` should return a scalar tensor. Found {found}. Try `.sum()`.")
    if isinstance(out, DualTensor):
        value, jvps = out.primal, out.tangents
    else:  # constant in x
        value, jvps = out.detach(), out.new_zeros(source.num_tangents)
    if not value.isfinite():
        raise ValueError(f"`f` should return a finite value. Found {value.item()}.")
    combined = combination(source, aggregator, drawn.gram(), jvps, drawn.dimension)
    return value, drawn.combine(combined.coefficients.unsqueeze(1))["x"].reshape(x.shape)
