"""The peak of memory that a call takes, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from multitangent_lab.benchmarks._case import device_of
from multitangent_lab.config import BenchConfig

_Run = Callable[[BenchConfig, Any], object]


def peak_mib(run: _Run, small: BenchConfig, config: BenchConfig, method: Any) -> float:
    """Peak memory in MiB of ``run(config, method)``, and of all that it makes.

    On a CPU this is the resident memory of a fresh process, less its memory before the call. On a
    GPU it is the allocated memory. A call with a small configuration comes first, so that what
    PyTorch loads at first use does not count.
    """
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (run, small, config, method))


def _peak(run: _Run, small: BenchConfig, config: BenchConfig, method: Any) -> float:
    run(small, method)
    cuda = device_of(config).type == "cuda"
    before = _start(cuda)
    run(config, method)
    return (_peak_bytes(cuda) - before) / 2**20


def _start(cuda: bool) -> int:
    """Set the peak back to what is in use now, and return that."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_bytes(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status should have a field {field}. Found none.")
