"""The commands `lr-search` and `lr-suggest`."""

from __future__ import annotations

import sys
from math import isfinite
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multitangent.learning_rate import suggest
from multitangent_lab.config import SearchConfig, SuggestConfig
from multitangent_lab.search._search import search
from multitangent_lab.training import AGGREGATORS


def run_search(config: SearchConfig, *, json: bool) -> dict[str, Any]:
    """Searches, and prints one line unless `json`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("trial {task.completed}/{task.total}  {task.fields[status]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as display:
        task = display.add_task(config.label, total=config.trials, status="")

        def progress(ended: int, rate: float, value: float) -> None:
            status = f"best {value:.4g} at {rate:.3g}" if isfinite(value) else ""
            display.update(task, completed=ended, status=status)

        result = search(config, progress)
        display.update(task, completed=result.trials)
    if not json:
        print(
            f"learning rate {result.learning_rate:.4g}: {result.value:.4g} "
            f"({result.trials} trials, {result.pruned} pruned); {result.run_dir}"
        )
    return result.as_json()


def run_suggest(config: SuggestConfig, *, json: bool) -> dict[str, Any]:
    """Suggests, and prints one line unless `json`."""
    rate = suggest(
        config.reference_rate,
        num_tangents=config.num_tangents,
        dimension=config.dimension,
        aggregator=AGGREGATORS[config.aggregator],
        headroom=config.headroom,
    )
    if not json:
        print(f"learning rate {rate:.4g}")
    return {"learning_rate": rate}
