"""How many samples are pushed at a time, from the size of their tangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from multitangent._batch import Part, call_model
from multitangent.perturbation._setting import Setting
from multitangent.perturbation._sites import Site, Visitor, observed

# Of the tangents of one intermediate value. On a CPU: what the caches hold and the allocator
# hands out again without asking the system; on a GPU: a share of its memory.
_CPU_BYTES = 20 * 2**20
_GPU_SHARE = 1 / 64


def _prime() -> None:
    """Let glibc keep twice 32 MiB of freed memory, as it does once a tensor of 32 MiB was freed.

    Its thresholds follow the largest block that was freed; no page of this one is touched.
    """
    torch.empty(2**25 - 2**12, dtype=torch.uint8)


def micro_batch_size(setting: Setting, batch: Part, sites: Sequence[Site]) -> int:
    """How many samples' tangents fit the budget: the whole batch, or a power of two.

    Measured on two samples: neither a random number of the user's nor running statistics change.

    Args:
        setting: The step.
        batch: The whole batch.
        sites: Where tangents enter; without any, they are there from the start.
    """
    _prime()
    if batch.size <= 2:
        return batch.size
    few = batch.take(slice(0, 2))
    largest = _Largest(not sites)
    try:
        with (
            torch.no_grad(),
            setting.part_of_batch(few, "couple"),
            largest,
            observed(sites, _First(largest)),
        ):
            call_model(setting.model, few.inputs)
    except (RuntimeError, ValueError, IndexError):  # a model for batches of one size only
        return batch.size
    of_sample = largest.bytes / 2 * setting.source.num_tangents
    fitting = _budget(batch) / max(of_sample, 1)
    if fitting >= batch.size:
        return batch.size
    return 2 ** int(log2(max(fitting, 1)))  # kernels prefer even numbers


def _budget(batch: Part) -> float:
    for value in pytree.tree_leaves(batch.inputs):
        if isinstance(value, Tensor) and value.is_cuda:
            return torch.cuda.get_device_properties(value.device).total_memory * _GPU_SHARE
    return _CPU_BYTES


class _Largest(TorchFunctionMode):
    """Notes the size of the largest floating-point result of any function, once it is active."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.bytes = 0
        self.active = active

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.active and _is_value(out) and not _is_whole(out, args):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


class _First(Visitor):
    """Wakes up the one who takes notes at the first site."""

    def __init__(self, largest: _Largest) -> None:
        super().__init__()
        self._largest = largest

    def leave(self, site: Site, output: Any) -> Any:
        if not self._largest.active:
            self._largest.active = True
            self._largest.bytes = sum(
                value.numel() * value.element_size()
                for value in pytree.tree_leaves(output)
                if _is_value(value)
            )
        return output


def _is_value(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_floating_point()


def _is_whole(out: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a result is a parameter, or made of nothing else: it has no samples."""
    return isinstance(out, torch.nn.Parameter) or all(
        isinstance(arg, torch.nn.Parameter) for arg in args if isinstance(arg, Tensor)
    )
