"""Floating-point operations of products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def count_flops(step: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention of one call.

    A multiplication and an addition count as two; elementwise operations and random numbers do not
    count. PyTorch's own `FlopCounterMode` follows modules by hooks that refuse the local steps of
    a forward gradient, so that only its formulas are used here.

    Examples:
        >>> a = torch.ones(2, 3)
        >>> count_flops(lambda: a @ a.T)
        24
    """
    with _Counter() as counter:
        step()
    return counter.total


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ATTENTION: dict[Any, Callable[..., int]] = {  # of query, key and value
    _FORWARD: sdpa_flop_count,
    _BACKWARD: sdpa_backward_flop_count,
}
_TENSORS = {_FORWARD: 3, _BACKWARD: 4}  # the backward's first is the output's gradient
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _ATTENTION:
            self.total += _ATTENTION[packet](*(x.shape for x in args[: _TENSORS[packet]]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is _ONEDNN_LINEAR:
            x, weight = args[:2]
            self.total += 2 * x.numel() * weight.shape[0]
        return out
