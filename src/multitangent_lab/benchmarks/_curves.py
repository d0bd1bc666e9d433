"""Time, memory and accuracy of a step against the number of tangents."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

from torch import Tensor

from multitangent_lab.benchmarks._case import Case, baselines, gradient_of, make_case, make_gradient
from multitangent_lab.benchmarks._memory import measure_memory
from multitangent_lab.benchmarks._timing import interleaved, medians, ratio
from multitangent_lab.config import BenchConfig

_MEMORY = ("backpropagation", "weights_redrawn", "activations", "activations_recomputed")


def curve_of_tangents(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for each K: times of a step in milliseconds, and peak memory in MiB."""
    case = make_case(config)
    rows = []
    for count in config.counts:
        here = replace(config, num_tangents=count)
        methods = {
            "backpropagation": case.backpropagation,
            "forward_gradient": case.step(make_gradient(here, case)),
            **{name: case.step(gradient) for name, gradient in baselines(here, case).items()},
        }
        times = interleaved(methods, config.repeats, before=case.model.zero_grad)
        row = {"num_tangents": count, **medians(times)}
        row["ratio_to_backpropagation"] = ratio(times, "forward_gradient", "backpropagation")
        memory = measure_memory(here, _MEMORY)
        rows.append(row | {name: v for name, v in memory.items() if name.endswith("_mib")})
    return rows


def curve_of_cosines(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for each K and way to share: the squared cosine with the true gradient, and its cost.

    The cosine is that of the gradients of all parameters, a mean over the repeats, each with
    tangents of its own, at the model's initial weights.
    """
    case = make_case(config)
    case.backpropagation()
    true = gradient_of(case)
    shares: tuple[Literal["batch", "sample"], ...] = ("batch", "sample")
    rows = []
    for share in shares:
        for count in config.counts:
            here = replace(config, num_tangents=count, share=share)
            rows.append({"share": share, "num_tangents": count, **_accuracy(here, case, true)})
    return rows


def _accuracy(config: BenchConfig, case: Case, true: Tensor) -> dict[str, float]:
    squares: list[float] = []

    def note(name: str) -> None:
        if name == "forward_gradient":
            gradient = gradient_of(case)
            squares.append(float((gradient @ true) ** 2 / (gradient @ gradient) / (true @ true)))

    methods = {
        "forward_gradient": case.step(make_gradient(config, case)),
        "backpropagation": case.backpropagation,
    }
    times = medians(interleaved(methods, config.repeats, case.model.zero_grad, note))
    cosine = fmean(squares)
    per_ms = cosine / times["forward_gradient_ms"]
    return {"squared_cosine": cosine, **times, "squared_cosine_per_ms": per_ms}
