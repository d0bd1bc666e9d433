"""The whole step, from a batch to the gradients of all parameters, without the optimiser's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from multitangent_lab.benchmarks._case import baselines, make_case, make_gradient
from multitangent_lab.benchmarks._flops import count_flops
from multitangent_lab.benchmarks._timing import interleaved, medians, ratio
from multitangent_lab.config import BenchConfig


def time_step(config: BenchConfig) -> dict[str, Any]:
    """Times of one step with each method, in milliseconds, medians over the rounds.

    Returns:
        ``forward_gradient_ms``, ``backpropagation_ms``, ``python_loop_ms``, ``vmap_jvp_ms`` and
        ``ratio_to_backpropagation``, and how many times faster than the other two;
        ``verification_ms``, which the first step of every kind of batch takes on top, and its time
        and its operations as multiples of a forward pass of eight samples.
    """
    case = make_case(config)
    few = replace(case, x=case.x[:8], y=case.y[:8])
    verified = make_gradient(config, case, verify="always")
    methods = {
        "backpropagation": case.backpropagation,
        "forward_gradient": case.step(make_gradient(config, case)),
        **{name: case.step(gradient) for name, gradient in baselines(config, case).items()},
        "verification": lambda: verified.prepare(case.x, case.y),
        "forward_of_8": few.forward,
    }
    times = interleaved(methods, config.repeats, before=case.model.zero_grad)
    return medians(times) | {
        "ratio_to_backpropagation": ratio(times, "forward_gradient", "backpropagation"),
        "times_faster_than_python_loop": ratio(times, "python_loop", "forward_gradient"),
        "times_faster_than_vmap_jvp": ratio(times, "vmap_jvp", "forward_gradient"),
        "verification_in_forwards_of_8": ratio(times, "verification", "forward_of_8"),
        "verification_flops_in_forwards_of_8": round(
            count_flops(methods["verification"]) / count_flops(few.forward), 2
        ),
    }
