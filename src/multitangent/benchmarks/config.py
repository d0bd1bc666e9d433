"""Configuration of the benchmarks, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed, as ratios within one run."""

    measure: Positional[Literal["step"]] = "step"
    """What is measured: step, the whole step from batch to gradients."""
    model: Literal["fc"] = "fc"
    """The network: fc, the paper's fully-connected one."""
    width: int = 256
    """Width of the hidden layers."""
    batch: int = 64
    """Samples per step."""
    num_tangents: int = 16
    """Tangents per step, K."""
    repeats: int = 20
    """Rounds of which the median is taken; every round runs each method once."""
    seed: int = 0
    """Seed of weights, data and tangents."""
