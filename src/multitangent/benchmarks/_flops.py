"""Floating-point operations of products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from multitangent.dual._kernels import _onednn_linear


def count_flops(step: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention of one call.

    A multiplication and an addition count as two; elementwise operations and random numbers do not
    count.

    Examples:
        >>> import torch
        >>> a = torch.ones(2, 3)
        >>> count_flops(lambda: a @ a.T)
        24
    """
    with _Counter() as counter:
        step()
    return counter.total


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is _onednn_linear:
            x, weight = args[:2]
            self.total += 2 * x.numel() * weight.shape[0]
        return out
