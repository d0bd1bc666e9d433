"""A network trained with one gradient and seed, as a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pandas as pd
from lightning.pytorch import Callback

from multitangent_lab.config import GradientName, TrainConfig, default_learning_rate
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._store import Cell, OutOfTimeError, Row
from multitangent_lab.training import NonFiniteLoss, evaluate_best, train


@dataclass(frozen=True)
class Training(Cell):
    """One run of `multitangent train`.

    Args:
        model: `"fc"`, `"resnet18"` or `"vit"`.
        dataset: The name of the data set.
        gradient: The gradient.
        num_tangents: K.
        seed: Of the weights, the order of the data and the tangents.
        learning_rate: Of SGD.
        width: Of the hidden layers of `"fc"`.
        batch_size: Samples per step.
        epochs: Epochs at most; early stopping comes before.
        simulated: Whether directional derivatives come from backpropagation.
        hidden_layers: Of `"fc"`.
        images: Training images used, and a quarter as many to validate; all for `None`.
        recalibrate: Whether batch normalisation takes its statistics anew before validation.
        learn_every: The number of steps from one in which guesses learn to the next, in the end.
        sites: The modules whose outputs are perturbed; the network's parts for `None`.
    """

    model: Literal["fc", "resnet18", "vit"]
    dataset: Literal["digits", "mnist", "cifar10"]
    gradient: GradientName
    num_tangents: int
    seed: int
    learning_rate: float
    width: int = 256
    batch_size: int = 64
    epochs: int = 200
    simulated: bool = False
    hidden_layers: int = 2
    images: int | None = None
    recalibrate: bool = False
    learn_every: int = 1
    sites: tuple[str, ...] | None = None


def training(
    model: Literal["fc", "resnet18", "vit"],
    dataset: Literal["digits", "mnist", "cifar10"],
    gradient: GradientName,
    num_tangents: int,
    seed: int,
    **options: Any,
) -> Training:
    """The cell with the learning rate published for it; `options` are its further fields."""
    width = options.get("width", Training.width)
    rate = default_learning_rate(dataset, gradient, num_tangents, model, width)
    if gradient == "backpropagation":
        options["simulated"] = False  # there is nothing to simulate
    return Training(model, dataset, gradient, num_tangents, seed, rate, **options)


# The eight gradients, the most telling first.
MOST_TELLING: Sequence[tuple[GradientName, int]] = (
    ("backpropagation", 1),
    ("projection", 16),
    ("mean", 16),
    ("single", 1),
    ("projection", 4),
    ("mean", 4),
    ("projection", 2),
    ("mean", 2),
)


def shortened(cells: Sequence[Any], epochs: int) -> list[Training]:
    """The first seed of every network, trained for so many epochs at most."""
    return [replace(cell, epochs=epochs) for cell in cells if cell.seed == 0]


def run(cell: Training, context: Context) -> list[Row]:
    """One row an epoch; that of the best validation loss has the test error too.

    A run that diverges ends there, says so in `diverged`, and is tested as it was before.
    """
    folder = context.store.scratch(cell) / "run"
    config = TrainConfig(
        **asdict(cell),
        data_dir=context.data_dir,
        device=context.device,
        run_dir=folder,
        resume=True,
    )
    try:
        result = train(config, [Deadline(context)])
    except NonFiniteLoss:
        epochs, diverged = _epochs(folder / "metrics.csv"), True
        tested = evaluate_best(config) if epochs else _UNTESTED
    else:
        epochs, diverged = _epochs(folder / "metrics.csv"), False
        tested = {name: getattr(result, name) for name in _UNTESTED}
    best = min(epochs, key=lambda row: row["validation_loss"], default=None)
    return [
        asdict(cell) | epoch | (tested if epoch is best else _UNTESTED) | {"diverged": diverged}
        for epoch in epochs or [{"epoch": 0, **dict.fromkeys(_MEASURED)}]
    ]


_MEASURED = ("train_loss", "validation_loss", "validation_error")
_UNTESTED: Row = {"test_loss": None, "test_error": None}


def _epochs(path: Path) -> list[Row]:
    """Without the times, which no two runs share; none for a run that diverged at once."""
    if not path.exists():
        return []
    table = pd.read_csv(path, usecols=["epoch", *_MEASURED]).astype(object)
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


class Deadline(Callback):
    """Stops between two epochs, of which the first has been saved."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def on_train_epoch_start(self, *_: Any) -> None:
        if self._context.late():
            raise OutOfTimeError


def results(rows: list[Row]) -> list[Row]:
    """One row a run: what was tested, and when training had been best and ended."""
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in _RUN), []).append(row)
    found = []
    for epochs in runs.values():
        best = min(epochs, key=lambda row: row["test_error"] is None)
        found.append(
            {name: best[name] for name in _RUN}
            | {"best_epoch": best["epoch"], "epochs": epochs[-1]["epoch"]}
            | {name: best[name] for name in ("validation_error", "test_error", "diverged")}
        )
    return found


_OF_THE_STUDY = ("epochs", "hidden_layers", "images", "recalibrate", "learn_every", "sites")
_RUN = tuple(f.name for f in fields(Training) if f.name not in _OF_THE_STUDY)
_GUESSING = 90.0  # per cent, of ten classes


def mean_test_errors(rows: list[Row], *by: str) -> dict[tuple[Any, ...], float]:
    """Mean test error over the seeds, in per cent, by those settings, gradient and K.

    Runs that diverged before the end of an epoch count as guessing among ten classes.
    """
    errors: dict[tuple[Any, ...], list[float]] = {}
    for row in results(rows):
        key = tuple(row[name] for name in (*by, "gradient", "num_tangents"))
        error = row["test_error"]
        errors.setdefault(key, []).append(_GUESSING if error is None else 100 * error)
    return {key: fmean(values) for key, values in errors.items()}
