"""Several gradients, side by side."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from pandas import read_csv

from multitangent_lab._files import write_text
from multitangent_lab.config import CompareConfig, TrainConfig
from multitangent_lab.training._curves import draw_curves
from multitangent_lab.training._draw_quality import draw_quality
from multitangent_lab.training._quality import QualityFile
from multitangent_lab.training._result import TrainResult
from multitangent_lab.training._train import train


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of a comparison.

    Args:
        run_dir: The folder with `curves.png`, `comparison.json` and the folder of every run.
        results: One result per gradient.
    """

    run_dir: Path
    results: tuple[TrainResult, ...]

    def time_ratio(self, result: TrainResult) -> float | None:
        """Returns the time of an epoch over that of backpropagation, if that was compared."""
        times = {other.gradient: other.seconds_per_epoch for other in self.results}
        reference = times.get("backpropagation")
        return result.seconds_per_epoch / reference if reference else None

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        runs = [
            r.as_json() | {"ratio_to_backpropagation": self.time_ratio(r)} for r in self.results
        ]
        return {"run_dir": str(self.run_dir), "runs": runs}


def compare(
    config: CompareConfig, callbacks: Callable[[TrainConfig], Sequence[Callback]] = lambda _: ()
) -> Comparison:
    """Trains the same model with several gradients, one after the other, and draws the curves.

    Runs that have finished before are not run again, those that have begun are continued. In the
    folder are `curves.png`, and for estimated gradients `quality.png`: how close they came to the
    true one, at every site and by every source of tangents, over the epochs.

    Args:
        config: What to compare.
        callbacks: Further callbacks for lightning's trainer, for each run.

    Returns:
        The results, in the order of `config.gradients`.

    Raises:
        ConfigError: The configuration cannot be run.
        DataError: The data set cannot be had.
        NonFiniteLoss: The loss of a run has become infinite or NaN; the others are kept.
    """
    config = config.resolved()
    folder = Path(config.run_dir or ".")
    runs = config.runs()
    results = tuple(
        train(run, [*callbacks(run), QualityFile(_quality(run), config.estimates)]) for run in runs
    )
    comparison = Comparison(run_dir=folder, results=results)
    width = f" of width {config.width}" if config.model == "fc" else ""
    title = f"{config.model}{width} on {config.data_name}"
    curves = {run.label: result.metrics() for run, result in zip(runs, results, strict=True)}
    draw_curves(curves, folder / "curves.png", title, loss_unit=config.loss_unit)
    assessed = {run.label: _quality(run) for run in runs}
    tables = {label: read_csv(path) for label, path in assessed.items() if path.exists()}
    if tables:
        draw_quality(tables, folder / "quality.png", title)
    write_text(folder / "comparison.json", json.dumps(comparison.as_json(), indent=2) + "\n")
    return comparison


def _quality(run: TrainConfig) -> Path:
    return Path(run.run_dir or ".") / "quality.csv"
