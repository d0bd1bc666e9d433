"""The sweep alone: tangents drawn, pushed, and the layers recorded for their local step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from multitangent.gradient import GradientEstimator
from multitangent.tangents import Tangents
from multitangent_lab.benchmarks._baselines import VmapJvp
from multitangent_lab.benchmarks._case import Case, make_case, make_gradient
from multitangent_lab.benchmarks._timing import interleaved, medians, ratio
from multitangent_lab.config import BenchConfig


def time_push(config: BenchConfig) -> dict[str, Any]:
    """Times of a sweep in milliseconds, beside what K + 1 forward passes would take.

    ``limit_ms`` is the time of one forward pass times ``1 + K share``, with the share of its
    floating-point operations that come after the first site.

    Returns:
        ``push_ms``, ``forward_ms``, ``vmap_jvp_ms``, ``limit_ms``, ``share``, ``ratio_to_limit``
        and ``times_faster_than_vmap_jvp``.
    """
    case = make_case(config)
    forward_gradient = make_gradient(config, case)
    methods = {
        "forward": case.forward,
        "push": _push(case, forward_gradient),
        "vmap_jvp": _push(case, make_gradient(config, case, VmapJvp)),
    }
    times = interleaved(methods, config.repeats)
    share = share_after_first_site(case, forward_gradient)
    factor = 1 + config.num_tangents * share
    return medians(times) | {
        "share": round(share, 4),
        "limit_ms": round(medians(times)["forward_ms"] * factor, 4),
        "ratio_to_limit": round(ratio(times, "push", "forward") / factor, 4),
        "times_faster_than_vmap_jvp": ratio(times, "vmap_jvp", "push"),
    }


def _push(case: Case, gradient: GradientEstimator) -> Callable[[], object]:
    def push() -> None:
        problem, batch, stream = gradient.prepare(case.x, case.y)
        tangents = Tangents(problem.source, stream)
        problem.engine(problem.perturbation(batch, stream, tangents), tangents)
        gradient.step += 1

    return push


def share_after_first_site(case: Case, gradient: GradientEstimator) -> float:
    """The fraction of a forward pass's floating-point operations that tangents go through."""
    problem, batch, stream = gradient.prepare(case.x, case.y)
    run = problem.perturbation(batch, stream, Tangents(problem.source, stream))
    counter = FlopCounterMode(display=False)
    before: list[int] = []

    def count(value: Tensor, name: str, samples: slice) -> Tensor:
        before.append(counter.get_total_flops())
        return value

    with torch.no_grad(), counter:
        run.evaluate(batch, count, "coupled")
    return 1 - before[0] / counter.get_total_flops()
