"""The command `multitangent bench`."""

from __future__ import annotations

import json as json_
from collections.abc import Callable
from typing import Any

from multitangent_lab._allocator import keep_freed_memory
from multitangent_lab._errors import ConfigError
from multitangent_lab._files import write_csv
from multitangent_lab._provenance import provenance
from multitangent_lab.benchmarks._case import BATCH
from multitangent_lab.benchmarks._curves import curve_of_cosines, curve_of_tangents
from multitangent_lab.benchmarks._guesses import table_of_guesses
from multitangent_lab.benchmarks._memory import measure_memory
from multitangent_lab.benchmarks._plots import draw_cosines, draw_tangents
from multitangent_lab.benchmarks._push import time_push
from multitangent_lab.benchmarks._statistics import compare_statistics
from multitangent_lab.benchmarks._step import time_step
from multitangent_lab.benchmarks._tuning import compare_tuning
from multitangent_lab.config import BenchConfig

_FIGURES: dict[str, Callable[[BenchConfig], dict[str, Any]]] = {
    "step": time_step,
    "push": time_push,
    "memory": measure_memory,
    "statistics": compare_statistics,
}
_Rows = list[dict[str, Any]]
_TABLES: dict[str, Callable[[BenchConfig], _Rows]] = {
    "tangents": curve_of_tangents,
    "cosine": curve_of_cosines,
    "guesses": table_of_guesses,
    "tuning": compare_tuning,
}
_PICTURES = {"tangents": draw_tangents, "cosine": draw_cosines}


def run_bench(config: BenchConfig, *, json: bool) -> dict[str, Any]:
    """Measures, writes what `config.out` asks for, and prints one line a figure unless `json`."""
    _check(config)
    if config.keep_memory:
        keep_freed_memory()
    result = _settings(config)
    if config.measure in _FIGURES:
        figures = _FIGURES[config.measure](config)
        result |= figures
        lines = [f"{name:34} {value}" for name, value in figures.items()]
    else:
        rows = _TABLES[config.measure](config)
        result["rows"] = rows
        lines = [", ".join(f"{name} {value}" for name, value in row.items()) for row in rows]
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            write_csv(config.out.with_suffix(".csv"), rows)
            if draw := _PICTURES.get(config.measure):
                draw(rows, config.out.with_suffix(".png"), _title(result))
    result["provenance"] = provenance()
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json_.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not json:
        print("\n".join(lines))
    return result


def _check(config: BenchConfig) -> None:
    for name in ("width", "batch", "num_tangents", "repeats"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ConfigError(f"`{name}` should be at least 1. Found {value}.")
    _check_tuning(config)
    measured = {"compile": ("step", "cosine"), "keep_memory": ("step", "push", "cosine")}
    for option, measures in measured.items():
        if getattr(config, option) and config.measure not in measures:
            raise ConfigError(
                f"`{option}` should go with {' or '.join(measures)}. Found {config.measure}, which "
                "does not measure it."
            )


def _check_tuning(config: BenchConfig) -> None:
    """Raise where an option is given that the measure would ignore."""
    others = ("model", "width", "num_tangents", "share", "tangent_dtype")
    ignored = others if config.measure == "tuning" else ("trained",)
    for name in ignored:
        if (value := getattr(config, name)) != getattr(BenchConfig, name):
            raise ConfigError(
                f"`{name}` should be left out for {config.measure}, which does not depend on it. "
                f"Found {value!r}."
            )


def _settings(config: BenchConfig) -> dict[str, Any]:
    if config.measure == "tuning":
        return {
            "measure": config.measure,
            "trained": config.trained,
            "language_model": list(config.language_model),
            "repeats": config.repeats,
        }
    width = {"width": config.width} if config.model == "fc" else {}
    return {
        "measure": config.measure,
        "model": config.model,
        **width,
        "batch": config.batch or BATCH[config.model],
        "num_tangents": config.num_tangents,
        "share": config.share,
        "compile": config.compile,
        "tangent_dtype": config.tangent_dtype,
        "tf32": config.tf32,
        "keep_memory": config.keep_memory,
        "repeats": config.repeats,
    }


def _title(result: dict[str, Any]) -> str:
    width = f" of width {result['width']}" if "width" in result else ""
    return f"{result['model']}{width}, batch of {result['batch']}"
