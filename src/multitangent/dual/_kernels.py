"""The products that most of the time goes into, by the fastest kernel at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 2**21  # multiplications below which the choice does not matter


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for a matrix of weights, in the type of `x`; autograd does not see it.

    On a CPU `F.linear` calls the BLAS library; for many rows and few columns, or the reverse, as
    tangents have, oneDNN is up to twice as fast where PyTorch has it.
    """
    weight = weight.to(x.dtype)
    if (
        weight.ndim == 2
        and x.is_cpu
        and x.dtype is torch.float32
        and x.numel() * weight.shape[0] >= _SMALL
        and _onednn_linear is not None
    ):
        product: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def _find_onednn_linear() -> Any:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn_linear = _find_onednn_linear()

# What computes a function's primal where no graph is recorded.
FASTER: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: linear}
