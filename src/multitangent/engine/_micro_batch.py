"""How many samples are pushed at a time, from the size of their tangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multitangent._structures import tensors_of
from multitangent.objective import Batch
from multitangent.perturbation import BoundPerturbation, Run
from multitangent.tangents import Stream, Tangents, TangentSource

# Of the tangents of one intermediate value. On a CPU: what the caches hold and the allocator
# hands out again without asking the system; on a GPU: a share of its memory.
_CPU_BYTES = 20 * 2**20
_GPU_SHARE = 1 / 64


def _prime() -> None:
    """Let glibc keep twice 32 MiB of freed memory, as it does once a tensor of 32 MiB was freed.

    Its thresholds follow the largest block that was freed; no page of this one is touched.
    """
    torch.empty(2**25 - 2**12, dtype=torch.uint8)


def micro_batch_size(
    perturbation: BoundPerturbation, batch: Batch, stream: Stream, source: TangentSource
) -> int:
    """How many samples' tangents fit the budget: the whole batch, or a power of two.

    Measured on two samples: neither a random number of the user's nor running statistics change.

    Args:
        perturbation: What is perturbed.
        batch: The whole batch.
        stream: The random numbers of the step.
        source: Where tangents come from.
    """
    _prime()
    if batch.size <= 2:
        return batch.size
    run = perturbation(batch, stream, Tangents(source, stream))
    peak = _PeakActivation(run)
    try:
        with torch.no_grad(), peak:
            run.evaluate(batch.take(slice(0, 2)), peak.inject, "coupled")
    except (RuntimeError, ValueError, IndexError):  # a model for batches of one size only
        return batch.size
    fitting = _budget(batch) / max(peak.bytes / 2 * source.num_tangents, 1)
    if fitting >= batch.size:
        return batch.size
    return 2 ** int(log2(max(fitting, 1)))  # kernels prefer even numbers


def _budget(batch: Batch) -> float:
    for value in tensors_of(batch.inputs):
        if value.is_cuda:
            return torch.cuda.get_device_properties(value.device).total_memory * _GPU_SHARE
    return _CPU_BYTES


class _PeakActivation(TorchFunctionMode):
    """Notes the size of the largest floating-point result behind the first perturbed value."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.bytes = 0
        self._run = run
        self._active = False

    def inject(self, value: Tensor, name: str, samples: slice) -> Tensor:
        """Leaves the value as it is, and takes notes from here on."""
        self._active = True
        if self._run.per_sample:
            self._note(value)
            return value
        return nn.Parameter(value, requires_grad=False)  # to be told from what has samples

    def _note(self, value: Tensor) -> None:
        self.bytes = max(self.bytes, value.numel() * value.element_size())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._active and _is_value(out) and not _is_whole(out, args):
            self._note(out)
        return out


def _is_value(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_floating_point()


def _is_whole(out: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a result is a parameter, or made of nothing else: it has no samples."""
    return isinstance(out, nn.Parameter) or all(
        isinstance(arg, nn.Parameter) for arg in args if isinstance(arg, Tensor)
    )
