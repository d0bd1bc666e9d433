"""Peak memory of one step, each in a process of its own."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from multitangent.perturbation import Activations
from multitangent_lab.benchmarks._case import Case, device_of, make_case, make_gradient
from multitangent_lab.config import BenchConfig

METHODS: dict[str, dict[str, Any] | None] = {
    "inference": None,
    "backpropagation": None,
    "weights": {"perturb": "weights"},
    "weights_redrawn": {"perturb": "weights", "store_tangents": False},
    "activations": {},
    "activations_recomputed": {"perturb": Activations(recompute=True), "store_tangents": False},
}


def measure_memory(
    config: BenchConfig, methods: tuple[str, ...] = tuple(METHODS)
) -> dict[str, Any]:
    """Peak memory of a step in MiB: parameters, batch, and all that comes on top.

    On a CPU the resident memory of a fresh process, less that of the same process before the model
    was made; on a GPU the allocated memory. A small step is run beforehand, so that what PyTorch
    loads at first use does not count.

    Returns:
        ``<method>_mib`` for every method, and ratios to inference and backpropagation.
    """
    peaks = {name: _in_own_process(config, name) for name in methods}
    ratios = {
        f"{name}_to_{other}": round(peaks[name] / peaks[other], 3)
        for other in ("inference", "backpropagation")
        for name in peaks
        if name != other and other in peaks
    }
    return {f"{name}_mib": round(peak, 1) for name, peak in peaks.items()} | ratios


def _in_own_process(config: BenchConfig, method: str) -> float:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (config, method))


def _peak(config: BenchConfig, method: str) -> float:
    """Peak memory of one step in MiB."""
    _run(make_case(_small(config)), config, method)
    cuda = device_of(config).type == "cuda"
    before = _start(cuda)
    _run(make_case(config), config, method)
    return (_peak_bytes(cuda) - before) / 2**20


def _small(config: BenchConfig) -> BenchConfig:
    from dataclasses import replace

    return replace(config, batch=2, width=min(config.width, 16))


def _run(case: Case, config: BenchConfig, method: str) -> None:
    options = METHODS[method]
    if method == "inference":
        case.model.eval()
        case.forward()
    elif options is None:
        case.backpropagation()
    else:
        case.step(make_gradient(config, case, **options))()


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
