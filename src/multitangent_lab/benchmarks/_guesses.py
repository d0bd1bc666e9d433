"""What guesses cost, beside backpropagation and beside random tangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from multitangent_lab.benchmarks._case import Case, make_case, make_gradient
from multitangent_lab.benchmarks._flops import count_flops
from multitangent_lab.benchmarks._timing import interleaved
from multitangent_lab.config import BenchConfig, TrainConfig
from multitangent_lab.training import build_gradient

_COUNTS = {"feedback": 4, "local": 4, "informed": 8}  # of the gradients of `multitangent train`


def table_of_guesses(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for each gradient: K, operations and the time of a step, as ratios too.

    Random tangents are shared by the batch, as is their default, and their step the usual one;
    guesses go with random tangents per sample and the exact derivative at the output.
    `random_tangents_of_equal_time` says for how many of them a step would take as long, between the
    numbers that were measured.
    """
    case = make_case(config)
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "backpropagation": (0, case.backpropagation),
        **{f"{k} random": (k, _random(config, case, k)) for k in config.counts},
        **{name: (k, _guessing(config, case, name, k)) for name, k in _COUNTS.items()},
    }
    times = interleaved(
        {name: step for name, (_, step) in steps.items()}, config.repeats, case.model.zero_grad
    )
    flops = {name: count_flops(step) for name, (_, step) in steps.items()}
    ratios = {
        name: median(a / b for a, b in zip(values, times["backpropagation"], strict=True))
        for name, values in times.items()
    }
    points = [(k, ratios[f"{k} random"]) for k in config.counts]
    return [
        {
            "gradient": name,
            "num_tangents": count,
            "flops": flops[name],
            "flops_to_backpropagation": round(flops[name] / flops["backpropagation"], 3),
            "ms": round(median(times[name]), 3),
            "ratio_to_backpropagation": round(ratios[name], 3),
            "random_tangents_of_equal_time": _equal(points, ratios[name])
            if name in _COUNTS
            else None,
        }
        for name, (count, _) in steps.items()
    ]


def _random(config: BenchConfig, case: Case, count: int) -> Callable[[], object]:
    return case.step(make_gradient(replace(config, num_tangents=count), case))


def _guessing(config: BenchConfig, case: Case, name: str, count: int) -> Callable[[], object]:
    chosen = TrainConfig(gradient=name, num_tangents=count, seed=config.seed)  # type: ignore[arg-type]
    gradient = build_gradient(chosen, case.model, case.loss)
    return lambda: gradient(case.x, case.y)


def _equal(points: list[tuple[int, float]], ratio: float) -> float | None:
    """The K of a ratio, on lines between those known; `None` beyond the last."""
    for (low, below), (high, above) in pairwise(points):
        if below <= ratio <= above:
            return round(low + (high - low) * (ratio - below) / (above - below), 1)
    return float(points[0][0]) if ratio <= points[0][1] else None
