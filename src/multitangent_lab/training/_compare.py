"""Several gradients, side by side."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from pandas import read_csv

from multitangent_lab._files import write_text
from multitangent_lab.config import CompareConfig, TrainConfig
from multitangent_lab.training._clock import Reached, reached
from multitangent_lab.training._curves import draw_curves
from multitangent_lab.training._draw_clock import draw_clock
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
        until_loss: The validation loss that the runs were to reach, if there was one.
    """

    run_dir: Path
    results: tuple[TrainResult, ...]
    until_loss: float | None = None

    def time_ratio(self, result: TrainResult) -> float | None:
        """Returns the time of an epoch over that of backpropagation, if that was compared."""
        times = {other.gradient: other.seconds_per_epoch for other in self.results}
        reference = times.get("backpropagation")
        return result.seconds_per_epoch / reference if reference else None

    def reached(self, result: TrainResult) -> tuple[Reached, ...]:
        """Returns when a run reached `until_loss`, and losses 5 % and 2 % above it."""
        return () if self.until_loss is None else reached(result.progress(), self.until_loss)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {"run_dir": str(self.run_dir), "runs": [self._as_json(r) for r in self.results]}

    def _as_json(self, result: TrainResult) -> dict[str, Any]:
        values = result.as_json() | {"ratio_to_backpropagation": self.time_ratio(result)}
        if self.until_loss is not None:
            values["reached"] = [found.as_json() for found in self.reached(result)]
        return values


def compare(
    config: CompareConfig, callbacks: Callable[[TrainConfig], Sequence[Callback]] = lambda _: ()
) -> Comparison:
    """Trains the same model with several gradients, one after the other, and draws the curves.

    Runs that have finished before are not run again, those that have begun are continued. In the
    folder are `curves.png`, and for estimated gradients `quality.png`: how close they came to the
    true one, at every site and by every source of tangents, over the epochs. With a loss to reach
    there is also `clock.png`: the validation loss against time and steps.

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
    until = config.until_loss
    if config.until_backpropagation:
        runs, until = _until_backpropagation(runs, lambda run: _train(config, run, callbacks(run)))
    results = tuple(_train(config, run, callbacks(run)) for run in runs)
    comparison = Comparison(run_dir=folder, results=results, until_loss=until)
    width = f" of width {config.width}" if config.model == "fc" else ""
    title = f"{config.model}{width} on {config.data_name}"
    curves = {run.label: result.metrics() for run, result in zip(runs, results, strict=True)}
    draw_curves(curves, folder / "curves.png", title, loss_unit=config.loss_unit)
    assessed = {run.label: _quality(run) for run in runs}
    tables = {label: read_csv(path) for label, path in assessed.items() if path.exists()}
    if tables:
        draw_quality(tables, folder / "quality.png", title)
    if until is not None:
        progress = {run.label: [r.progress()] for run, r in zip(runs, results, strict=True)}
        draw_clock(progress, until, folder / "clock.png", title, loss_unit=config.loss_unit)
    write_text(folder / "comparison.json", json.dumps(comparison.as_json(), indent=2) + "\n")
    return comparison


def _until_backpropagation(
    runs: Sequence[TrainConfig], train: Callable[[TrainConfig], TrainResult]
) -> tuple[tuple[TrainConfig, ...], float]:
    """The runs, and the loss of backpropagation that all other runs are to reach."""
    (first,) = (run for run in runs if run.gradient == "backpropagation")
    until = float(train(first).progress()["validation_loss"].min())
    others = (replace(run, until_loss=until) if run is not first else run for run in runs)
    return tuple(others), until


def _train(config: CompareConfig, run: TrainConfig, callbacks: Sequence[Callback]) -> TrainResult:
    return train(run, [*callbacks, QualityFile(_quality(run), config.estimates)])


def _quality(run: TrainConfig) -> Path:
    return Path(run.run_dir or ".") / "quality.csv"
