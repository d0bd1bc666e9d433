"""The command `multitangent bench`."""

from __future__ import annotations

import sys
from typing import Any

from multitangent.benchmarks._provenance import provenance
from multitangent.benchmarks._step import time_step
from multitangent.benchmarks.config import BenchConfig


def run_bench(config: BenchConfig, *, json: bool) -> dict[str, Any]:
    """Measures, and prints one line a figure unless `json`."""
    result = time_step(config) | {"provenance": provenance(sys.argv[1:])}
    if not json:
        for name, value in result.items():
            if name.endswith("_ms") or name.startswith("ratio"):
                print(f"{name:28} {value}")
    return result
