"""What guesses cost, beside backpropagation and beside random tangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from multitangent.gradient import GradientEstimator
from multitangent.tangents import Every
from multitangent_lab.benchmarks._case import Case, make_case, make_gradient
from multitangent_lab.benchmarks._flops import count_flops
from multitangent_lab.benchmarks._timing import interleaved
from multitangent_lab.config import BenchConfig, ChosenName, TrainConfig
from multitangent_lab.training import build_gradient

_COUNTS: Mapping[ChosenName, int] = {"feedback": 4, "local": 4}  # others: as by default
_GUESSES: Sequence[ChosenName] = ("feedback", "local", "informed", "auto")


@dataclass(frozen=True)
class _Method:
    """One step of a gradient, or all steps from one that learns to the next."""

    gradient: str
    num_tangents: int
    run: Callable[[], object]
    steps: int = 1
    sites: str | None = None
    is_default: bool = False


def table_of_guesses(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for each gradient: K, operations and the time of a step, as ratios too.

    Random tangents are shared by the batch, as is their default, and their step the usual one;
    guesses go with random tangents per sample and the exact derivative at the output. Where they
    learn in some steps only, the figures are the mean of a step over a whole period, long after the
    start. `is_default` marks the gradient of `multitangent train`, which suits the model.
    `random_tangents_of_equal_time` is the number of random tangents with which a step would take as
    long, interpolated between the numbers that were measured.
    """
    case = make_case(config)
    methods: dict[str, _Method] = {
        "backpropagation": _Method("backpropagation", 0, case.backpropagation),
        **{f"{k} random": _random(config, case, k) for k in config.counts},
        **{name: _guessing(config, case, name) for name in _GUESSES},
    }
    times = interleaved(
        {name: method.run for name, method in methods.items()}, config.repeats, case.model.zero_grad
    )
    times = {n: [time / methods[n].steps for time in values] for n, values in times.items()}
    flops = {name: count_flops(method.run) / method.steps for name, method in methods.items()}
    ratios = {
        name: median(a / b for a, b in zip(values, times["backpropagation"], strict=True))
        for name, values in times.items()
    }
    points = [(k, ratios[f"{k} random"]) for k in config.counts]
    return [
        {
            "gradient": method.gradient,
            "num_tangents": method.num_tangents,
            "learn_every": method.steps,
            "flops": round(flops[name]),
            "flops_to_backpropagation": round(flops[name] / flops["backpropagation"], 3),
            "ms": round(median(times[name]), 3),
            "ratio_to_backpropagation": round(ratios[name], 3),
            "random_tangents_of_equal_time": _equal(points, ratios[name])
            if name in _GUESSES
            else None,
            "sites": method.sites,
            "is_default": method.is_default,
        }
        for name, method in methods.items()
    ]


def _random(config: BenchConfig, case: Case, count: int) -> _Method:
    step = case.step(make_gradient(replace(config, num_tangents=count), case))
    return _Method(f"{count} random", count, step)


def _guessing(config: BenchConfig, case: Case, name: ChosenName) -> _Method:
    count = _COUNTS.get(name)
    chosen = TrainConfig(
        model=config.model, gradient=name, num_tangents=count, seed=config.seed
    ).resolved()
    assert chosen.num_tangents is not None
    gradient = build_gradient(chosen, case.model, case.loss)
    assert isinstance(gradient, GradientEstimator)
    steps = chosen.learn_every or 1
    case.model.zero_grad()
    gradient(case.x, case.y)
    if isinstance(gradient.tangents, Every):
        gradient.step = gradient.tangents.settled

    def run() -> None:
        for _ in range(steps):
            case.model.zero_grad()
            gradient(case.x, case.y)

    sites = None if chosen.sites is None else " ".join(chosen.sites)
    return _Method(chosen.gradient, chosen.num_tangents, run, steps, sites, name == "auto")


def _equal(points: list[tuple[int, float]], ratio: float) -> float | None:
    """The K of a ratio, on lines between those known; `None` beyond the last."""
    for (low, below), (high, above) in pairwise(points):
        if below <= ratio <= above:
            return round(low + (high - low) * (ratio - below) / (above - below), 1)
    return float(points[0][0]) if ratio <= points[0][1] else None
