"""Times of several methods, so taken that they can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def interleaved(
    methods: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    after: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Milliseconds of each method in each round, after one round that does not count.

    Every round runs each method once, in turn, so that a machine whose speed drifts slows all of
    them alike. Ratios are to be taken round by round.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(rounds + 1):
        for name, method in methods.items():
            before()
            _wait()
            start = time.perf_counter()
            method()
            _wait()
            elapsed = (time.perf_counter() - start) * 1e3
            if round_ > 0:
                times[name].append(elapsed)
                after(name)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each method, with the unit in its name."""
    return {f"{name}_ms": round(median(values), 4) for name, values in times.items()}


def ratio(times: Mapping[str, list[float]], name: str, other: str) -> float:
    """The median of the rounds' ratios of two methods."""
    pairs = zip(times[name], times[other], strict=True)
    return round(median(a / b for a, b in pairs), 4)
