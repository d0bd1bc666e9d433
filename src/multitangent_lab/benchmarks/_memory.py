"""Peak memory of one step, each in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from multitangent.perturbation import Activations
from multitangent_lab.benchmarks._case import make_case, make_gradient
from multitangent_lab.benchmarks._peak import peak_mib
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

    Returns:
        ``<method>_mib`` for every method, and ratios to inference and backpropagation.
    """
    peaks = {name: peak_mib(_run, _small(config), config, name) for name in methods}
    ratios = {
        f"{name}_to_{other}": round(peaks[name] / peaks[other], 3)
        for other in ("inference", "backpropagation")
        for name in peaks
        if name != other and other in peaks
    }
    return {f"{name}_mib": round(peak, 1) for name, peak in peaks.items()} | ratios


def _small(config: BenchConfig) -> BenchConfig:
    return replace(config, batch=2, width=min(config.width, 16))


def _run(config: BenchConfig, method: str) -> None:
    case, options = make_case(config), METHODS[method]
    if method == "inference":
        case.model.eval()
        case.forward()
    elif options is None:
        case.backpropagation()
    else:
        case.step(make_gradient(config, case, **options))()
