"""The products that most of the time goes into, by the fastest kernel at hand.

On a CPU `F.linear` calls the BLAS library. For matrices of many rows and few columns, or the
reverse, as tangents and batches have, oneDNN was the faster one where this was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from multitangent._deferred_checks import tracing

_SMALL = 2**21  # multiplications below which the choice does not matter
_SMALL_RECORDED = 2**25  # the same where autograd would have to register a custom function


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the type of `x`; autograd does not see it."""
    weight = weight.to(x.dtype)
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    product: Tensor = (_opaque_linear if tracing() else _by_onednn)(x, weight, bias)
    return product


def recorded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, recorded by autograd where that is asked for; once differentiable."""
    if torch.is_grad_enabled() and x.numel() * weight.shape[0] < _SMALL_RECORDED:
        return F.linear(x, weight, bias)
    if not _pays(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        product: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return linear(x, weight, bias)


# What computes the primal of a function in its place.
FASTER: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: recorded_linear}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        return (
            linear(gradient, weight.t()) if wanted[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes it, and no transformation would be lost that it knows nothing of."""
    return (
        x.is_cpu
        and forward_ad._current_level < 0
        and not any(is_functorch_wrapped_tensor(t) for t in (x, weight))
        and x.dtype is torch.float32
        and weight.ndim == 2
        and x.numel() * weight.shape[0] >= _SMALL
        and _onednn_linear is not None
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return product


# For a compiled step, which takes PyTorch's own operation only with constant weights.
_library: Any = torch.library.Library("multitangent", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", _by_onednn, "CPU")
_opaque_linear = torch.ops.multitangent.linear


@torch.library.register_fake("multitangent::linear")  # type: ignore[untyped-decorator]
def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _find_onednn_linear() -> Any:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn_linear = _find_onednn_linear()
