"""A trial run of a few samples: how many are pushed at a time, and what a split has to mind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multitangent._structures import tensors_of
from multitangent.objective import RANDOM, Batch, Change, Objective, kept_parameters
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


@dataclass(frozen=True)
class Trial:
    """What a run of two samples, or one of two, tells about a kind of batch.

    Attributes:
        micro_batch: How many samples' tangents fit the budget: the whole batch, or a power of two.
        shapes: Of the perturbed values, by name.
        is_whole: Whether a batch has to be run as a whole, since the model writes into parameters,
            or the loss is one number for the batch.
        has_state: Whether modules may keep something from one run to the next.
        normalizes: Whether batch normalisation in training mode may happen.
        is_plain: Whether parts of a batch need nothing of the whole: no random numbers, no
            statistics, and nothing that modules keep from one run to the next.
        writes: Whether the model writes into parameters.
        compares: Whether two parts are run as one and compared with the parts, if the whole batch
            is not run because it may not fit.
    """

    micro_batch: int
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    is_whole: bool = False
    has_state: bool = True
    normalizes: bool = True
    is_plain: bool = False
    writes: bool = False
    compares: bool = False


def run_few(
    perturbation: BoundPerturbation,
    objective: Objective,
    batch: Batch,
    stream: Stream,
    source: TangentSource,
    num_tangents: int | None = None,
) -> Trial:
    """Run two samples, or one of two, and look how large values become. Nothing stays of it.

    Args:
        perturbation: What is perturbed.
        objective: The model and its loss.
        batch: The whole batch.
        stream: The random numbers of the step.
        source: Where tangents come from.
        num_tangents: How many of them this process pushes, by default all.
    """
    _prime()
    if batch.size == 1:
        return Trial(1)
    try:
        few = batch.take(slice(0, 2 if batch.size > 2 else 1)).copied()
    except ValueError:  # of a structure that can not be split
        return Trial(batch.size)
    run = perturbation(few, stream, Tangents(source, stream))
    notes = _Notes(run)
    before = objective.saved_state()
    try:
        with torch.no_grad(), kept_parameters(objective.model) as written, notes:
            run.evaluate(few, notes.inject, "coupled")
        has_state = before.is_touched() or bool(Change(before))
    except Exception:  # a model for batches of one size only; or the step will say what is wrong
        return Trial(batch.size)
    finally:
        before.restore()
    pushed = source.num_tangents if num_tangents is None else num_tangents
    fitting = _budget(batch) / max(notes.bytes / few.size * pushed, 1)
    size = 2 ** int(log2(max(fitting, 1)))  # kernels prefer even numbers
    of_batch = objective.loss.is_of_batch
    if fitting >= batch.size or few.is_written or written or of_batch:
        size = batch.size
    writes = bool(written) or few.is_written
    coupled = has_state or writes or notes.is_random or notes.normalizes
    return Trial(
        size,
        notes.shapes,
        bool(written) or of_batch,
        has_state,
        notes.normalizes,
        is_plain=not coupled,
        writes=bool(written),
    )


def _budget(batch: Batch) -> float:
    for value in tensors_of(batch.inputs):
        if value.is_cuda:
            return torch.cuda.get_device_properties(value.device).total_memory * _GPU_SHARE
    return _CPU_BYTES


class _Notes(TorchFunctionMode):
    """Notes what happens: sizes, shapes, and whether anything depends on more than the sample.

    Attributes:
        bytes: The size of the largest floating-point result behind the first perturbed value.
        shapes: Of the perturbed values, by name.
        is_random: Whether random numbers were used.
        normalizes: Whether statistics of a batch may have been used.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.bytes = 0
        self.shapes: dict[str, torch.Size] = {}
        self.is_random = False
        self.normalizes = False
        self._run = run
        self._active = False
        self._random_state: Tensor | None = None

    def inject(self, value: Tensor, name: str, samples: slice) -> Tensor:
        """Leaves the value as it is, and takes notes of sizes from here on."""
        self._active = True
        self.shapes[name] = value.shape
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
        kwargs = {} if kwargs is None else kwargs
        before = torch.get_rng_state()
        out = func(*args, **kwargs)
        self.is_random |= (
            kwargs.get("generator") is not None
            or func in RANDOM
            or not torch.equal(before, torch.get_rng_state())
        )
        self.normalizes |= func in (F.batch_norm, F.instance_norm)
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
