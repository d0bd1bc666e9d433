"""What a step costs compared with inference, from small runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multitangent._structures import tensors_of

_REPEATS = 3
_LONG = 1.0  # seconds; what takes longer runs once


@dataclass(frozen=True)
class Expectation:
    """What a step with K tangents is expected to cost.

    Attributes:
        num_tangents: K.
        samples: The samples of the measured batch.
        seconds: The time of a step.
        bytes: The peak memory of a step, with the model and the batch.
        time_ratio: Seconds of a step over those of inference.
        memory_ratio: Bytes of a step over those of inference.
    """

    num_tangents: int
    samples: int
    seconds: float
    bytes: float
    time_ratio: float
    memory_ratio: float

    def __str__(self) -> str:
        return (
            f"expected cost of a step, K = {self.num_tangents}, {_samples(self.samples)} at once: "
            f"{_time(self.seconds)}, {self.time_ratio:.3g} times inference; "
            f"{_size(self.bytes)} with model and batch, {self.memory_ratio:.3g} times"
        )


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(size: float) -> str:
    exponent = 3 if size >= 2**30 else 2 if size >= 2**20 else 1
    return f"{size / 2 ** (10 * exponent):.3g} {'KMG'[exponent - 1]}iB"


@dataclass(frozen=True)
class Cost:
    """Measured time and memory of inference and of steps with a few numbers of tangents.

    Times are medians of three runs after a first one, or of one run that takes over a second.
    Bytes count parameters, buffers and batch, and the tensors that PyTorch's functions returned:
    the largest sum of the sizes of those that were alive at once. What a single function needs
    inside does not count. All samples run at once. A step in micro-batches needs less memory.

    Attributes:
        samples: The samples of the batch.
        fixed: The bytes of parameters, buffers and batch.
        inference: Seconds and further bytes of a run of model and loss without gradients.
        steps: Seconds and further bytes of a step, by K.
    """

    samples: int
    fixed: int
    inference: tuple[float, int]
    steps: Mapping[int, tuple[float, int]]

    def expected(self, num_tangents: int) -> Expectation:
        """What a step with K tangents should cost, by a straight line through what was measured.

        Args:
            num_tangents: K.

        Examples:
            >>> steps = {1: (1.0, 200), 5: (2.0, 600)}
            >>> cost = Cost(4, fixed=100, inference=(0.5, 100), steps=steps)
            >>> cost.expected(9).seconds, cost.expected(9).memory_ratio
            (3.0, 5.5)
        """
        (few, low), *_, (many, high) = sorted(self.steps.items())
        share = (num_tangents - few) / (many - few)
        seconds, size = (a + share * max(b - a, 0) for a, b in zip(low, high, strict=True))
        size += self.fixed
        return Expectation(
            num_tangents,
            self.samples,
            seconds,
            size,
            seconds / max(self.inference[0], 1e-9),
            size / max(self.inference[1] + self.fixed, 1),
        )


def measure_cost(
    samples: int,
    fixed: int,
    inference: Callable[[], Any],
    steps: Mapping[int, Callable[[], Any]],
) -> Cost:
    """Run inference and steps a few times each.

    Args:
        samples: The number of samples in each run.
        fixed: The bytes that are in use before a run.
        inference: Runs model and loss.
        steps: For each K, a function that takes one step. There are at least two.
    """
    return Cost(
        samples,
        fixed,
        (_seconds(inference), peak_bytes(inference)),
        {k: (_seconds(step), peak_bytes(step)) for k, step in steps.items()},
    )


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
        if times[0] > _LONG:
            return times[0]
    return median(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int:
    """The largest sum of the sizes of live tensors that a run makes.

    Examples:
        >>> ones = torch.ones(256)
        >>> peak_bytes(lambda: ones + 1 + 1 + 1)
        2048
    """
    with _LiveTensors() as live:
        run()
    return live.peak


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the sizes of the tensors that functions return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        old = {_address(value) for value in tensors_of((args, dict(kwargs)))}
        out = func(*args, **kwargs)
        for value in tensors_of(out):
            if _address(value) not in old:
                self._add(value)
        return out

    def _add(self, value: Tensor) -> None:
        address = _address(value)
        if address in self._seen or address == 0:
            return
        storage = value.untyped_storage()
        self._seen.add(address)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        finalize(storage, self._free, address, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.bytes -= size


def _address(value: Tensor) -> int:
    """Where a tensor's numbers lie, or 0 if it has no memory of the usual kind."""
    try:
        return value.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0
