"""The whole step, from a batch to the gradients of all parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from multitangent._estimator import GradientEstimator
from multitangent._forward_gradient import ForwardGradient
from multitangent.aggregation import Projection
from multitangent.benchmarks._baselines import PythonLoop, VmapJvp
from multitangent.benchmarks.config import BenchConfig
from multitangent.models import fully_connected
from multitangent.tangents import Normal


def time_step(config: BenchConfig) -> dict[str, Any]:
    """Times of one step without the optimiser's, in milliseconds, medians over the rounds.

    Every round runs each method once, in turn, so that a machine whose speed drifts slows all of
    them alike; the ratio is the median of the rounds' ratios.

    Returns:
        ``forward_gradient_ms``, ``backpropagation_ms``, ``python_loop_ms``, ``vmap_jvp_ms`` and
        ``ratio_to_backpropagation``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = fully_connected((1, 28, 28), num_classes=10, width=config.width)
        x = torch.randn(config.batch, 1, 28, 28)
        y = torch.randint(10, (config.batch,))
    loss = nn.CrossEntropyLoss()
    source, aggregator = Normal(config.num_tangents), Projection()

    def backpropagation() -> None:
        loss(model(x), y).backward()

    methods: dict[str, Callable[[], object]] = {"backpropagation": backpropagation}
    kinds: dict[str, Callable[..., GradientEstimator]] = {
        "forward_gradient": ForwardGradient,
        "python_loop": PythonLoop,
        "vmap_jvp": VmapJvp,
    }
    for name, kind in kinds.items():
        gradient = kind(model, loss, source, aggregator, seed=config.seed)
        methods[name] = lambda gradient=gradient: gradient(x, y)  # type: ignore[misc]
    times = interleaved(methods, config.repeats, before=model.zero_grad)
    pairs = zip(times["forward_gradient"], times["backpropagation"], strict=True)
    medians = {f"{name}_ms": round(median(values), 4) for name, values in times.items()}
    return {
        "measure": "step",
        "model": config.model,
        "width": config.width,
        "batch": config.batch,
        "num_tangents": config.num_tangents,
        "repeats": config.repeats,
        **medians,
        "ratio_to_backpropagation": round(median(a / b for a, b in pairs), 4),
    }


def interleaved(
    methods: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object]
) -> dict[str, list[float]]:
    """Milliseconds of each method in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(rounds + 1):
        for name, method in methods.items():
            before()
            start = time.perf_counter()
            method()
            elapsed = (time.perf_counter() - start) * 1e3
            if round_ > 0:
                times[name].append(elapsed)
    return times
