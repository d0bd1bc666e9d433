"""A cell: one run with its validation losses against time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from multitangent_lab.config import GradientName, TrainConfig
from multitangent_lab.data import data_directory
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._store import Cell, Row
from multitangent_lab.experiments._training import Deadline
from multitangent_lab.training import NonFiniteLoss, seconds_per_step, train


@dataclass(frozen=True)
class TimedTraining(Cell):
    """One run of `multitangent train` without early stopping, validated at intervals of steps.

    Args:
        setting: The name of the model with its data.
        gradient: The gradient.
        num_tangents: K.
        learning_rate: The learning rate of the model's default optimizer.
        seed: The seed of the weights, the order of the data and the tangents.
        epochs: The largest number of epochs.
        evaluate_every: Steps between two validations.
        model: The model.
        dataset: The data set.
        until_loss: The validation loss at which the run ends; None for none.
        text_file: The file of the text in the folder of the data; None for Python's own library.
        batch_size: Samples per step.
        images: Training samples used, and a quarter as many to validate; all for `None`.
        recalibrate: Whether batch normalisation takes its statistics anew before validations.
        width: Of the hidden layers of `"fc"`.
        context: Tokens of a sample of text.
        embedding: Width of a token in `"gpt"`.
        blocks: Blocks of `"gpt"`.
        learn_every: The number of steps from one in which guesses learn to the next, in the end.
        sites: The modules whose outputs are perturbed; the network's parts for `None`.
        share: Whether the samples of a batch share their tangents; as suits the gradient for
            `None`.
        credit: Whether the loss of every sample is measured, or that of every token.
        differences: Whether directional derivatives are finite differences of losses.
    """

    setting: str
    gradient: GradientName
    num_tangents: int
    learning_rate: float
    seed: int
    epochs: int
    evaluate_every: int
    model: Literal["fc", "resnet18", "vit", "gpt"]
    dataset: Literal["digits", "mnist", "fashion-mnist", "cifar10", "text"]
    until_loss: float | None = None
    text_file: str | None = None
    batch_size: int = 64
    images: int | None = None
    recalibrate: bool = False
    width: int = 256
    context: int = 64
    embedding: int = 128
    blocks: int = 4
    learn_every: int = 1
    sites: tuple[str, ...] | None = None
    share: Literal["batch", "sample"] | None = None
    credit: Literal["sample", "token"] = "sample"
    differences: bool = False


def run(cell: TimedTraining, context: Context) -> list[Row]:
    """One row for each validation, including the one before the first step.

    `seconds` is the number of steps times the time of a step, which is one number for the whole
    run: see `seconds_per_step`. `wall_seconds` is the time of the steps so far on the clock, and
    `processor_seconds` is their processor time. A run ends where it diverges, and `diverged` says
    so.
    """
    folder = context.store.scratch(cell) / "run"
    diverged = False
    try:
        train(_config(cell, context, folder), [Deadline(context)])
    except NonFiniteLoss:
        diverged = True
    progress = pd.read_csv(folder / "progress.csv")
    seconds = seconds_per_step(progress)
    measured = {
        "epoch": progress["epoch"].round(4),
        "step": progress["step"],
        "seconds": (progress["step"] * seconds).round(4) if seconds is not None else 0.0,
        "wall_seconds": progress["seconds"].round(4),
        "processor_seconds": progress["processor_seconds"].round(4),
        "validation_loss": progress["validation_loss"],
        "diverged": diverged,
    }
    table = pd.DataFrame(measured).astype(object)
    return [asdict(cell) | {str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _config(cell: TimedTraining, context: Context, folder: Path) -> TrainConfig:
    values = asdict(cell)
    text_file = values.pop("text_file")
    del values["setting"]
    return TrainConfig(
        **values,
        data_file=None if text_file is None else data_directory(context.data_dir) / text_file,
        patience=cell.epochs,
        data_dir=context.data_dir,
        device=context.device,
        run_dir=folder,
        resume=True,
    )
