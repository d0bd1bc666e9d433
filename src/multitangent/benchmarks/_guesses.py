"""What guesses cost, beside backpropagation and beside random tangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from multitangent._forward_gradient import ForwardGradient
from multitangent.aggregation import ControlVariate
from multitangent.benchmarks._case import Case, make_case, make_gradient
from multitangent.benchmarks._flops import count_flops
from multitangent.benchmarks._timing import interleaved
from multitangent.benchmarks.config import BenchConfig
from multitangent.perturbation import Activations
from multitangent.tangents import Balanced, Feedback, LocalLoss, Normal, Radial, TangentSource

_SOURCES: dict[str, TangentSource] = {
    "feedback": Balanced(Normal(2)) + Feedback() + Radial(),
    "local losses": Balanced(Normal(2)) + LocalLoss() + Radial(),
    "both, per layer": Balanced(Normal(2)) + Feedback(4) + LocalLoss() + Radial(),
}


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
        **{name: (s.num_tangents, _guessing(config, case, s)) for name, s in _SOURCES.items()},
    }
    times = interleaved(
        {name: step for name, (_, step) in steps.items()}, config.repeats, case.model.zero_grad
    )
    flops = {name: count_flops(step) for name, (_, step) in steps.items()}
    ratios = {
        name: median(a / b for a, b in zip(values, times["backpropagation"], strict=True))
        for name, values in times.items()
    }
    known = [(k, ratios[f"{k} random"]) for k in config.counts]
    return [
        {
            "gradient": name,
            "num_tangents": count,
            "flops": flops[name],
            "flops_to_backpropagation": round(flops[name] / flops["backpropagation"], 3),
            "ms": round(median(times[name]), 3),
            "ratio_to_backpropagation": round(ratios[name], 3),
            "random_tangents_of_equal_time": _equal(known, ratios[name])
            if name in _SOURCES
            else None,
        }
        for name, (count, _) in steps.items()
    ]


def _random(config: BenchConfig, case: Case, count: int) -> Callable[[], object]:
    return case.step(make_gradient(replace(config, num_tangents=count), case))


def _guessing(config: BenchConfig, case: Case, source: TangentSource) -> Callable[[], object]:
    perturb = Activations(share="sample", output="exact")
    return case.step(
        ForwardGradient(case.model, case.loss, source, ControlVariate(), perturb, config.seed)
    )


def _equal(known: list[tuple[int, float]], ratio: float) -> float | None:
    """The K of a ratio, on lines between those known; `None` beyond the last."""
    for (low, below), (high, above) in pairwise(known):
        if below <= ratio <= above:
            return round(low + (high - low) * (ratio - below) / (above - below), 1)
    return float(known[0][0]) if ratio <= known[0][1] else None
