"""One run, from a configuration to its result."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from multitangent import AutoStep
from multitangent.gradient import GradientEstimator
from multitangent_lab._files import write_text
from multitangent_lab.config import TrainConfig
from multitangent_lab.data import Dataset, OwnData, Text
from multitangent_lab.models import build_model
from multitangent_lab.training._callbacks import MetricsFile
from multitangent_lab.training._curves import draw_curves
from multitangent_lab.training._data import DatasetModule, load_data
from multitangent_lab.training._model import language_model, own_model
from multitangent_lab.training._module import GradientModule
from multitangent_lab.training._named_gradients import build_gradient
from multitangent_lab.training._optimizers import build_optimizer
from multitangent_lab.training._progress_file import ProgressFile
from multitangent_lab.training._result import TrainResult, read_result
from multitangent_lab.training._run_folder import begin, checkpoint, is_finished
from multitangent_lab.training._statistics import Recalibration
from multitangent_lab.training._trainer import build_trainer, choose_device, interruptible, quiet


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Trains one model with one gradient, and tests it as it was at the best epoch.

    Training stops when the validation loss has not improved for `config.patience` epochs, or is at
    most `config.until_loss`. A run that has finished before is not run again: its stored result
    is returned.

    Args:
        config: What to train and how.
        callbacks: Further callbacks for lightning's trainer.

    Returns:
        The result, which is stored in the run's folder as well.

    Raises:
        ConfigError: The configuration cannot be run.
        DataError: The data set cannot be had.
        NonFiniteLoss: The loss has become infinite or NaN.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     result = train(TrainConfig(gradient="backpropagation", epochs=2, run_dir=folder))
        ...     print(result.metrics()["epoch"].tolist())
        [1, 2]
    """
    config = config.resolved()
    folder = Path(config.run_dir or ".")
    if is_finished(config, folder):
        return read_result(folder)
    try:
        return _train(config, folder, callbacks)
    finally:
        gc.collect()  # lightning's cycles of references, which hold the data


def _train(config: TrainConfig, folder: Path, callbacks: Sequence[Callback]) -> TrainResult:
    with quiet(), interruptible():
        metrics = MetricsFile(folder / "metrics.csv")
        extras = [metrics, *_further(config, folder)]
        last, best = (checkpoint(folder, name) for name in ("last", "best"))
        module, data, trainer = _prepared(config, folder, [*callbacks, *extras])
        begin(config, folder)
        if isinstance(data.dataset, Text):
            described = json.dumps(data.dataset.description(), indent=2)
            write_text(folder / "data.json", described + "\n")
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
        rows = metrics.rows  # as of now: the best checkpoint brings its own
        (tested,) = trainer.test(module, data, ckpt_path=best, verbose=False)
    best_row = min(rows, key=lambda row: row["validation_loss"])
    result = TrainResult(
        run_dir=folder,
        gradient=config.gradient,
        num_tangents=None if config.gradient == "backpropagation" else config.num_tangents,
        learning_rate=module.learning_rate,
        epochs=len(rows),
        best_epoch=int(best_row["epoch"]),
        validation_loss=best_row["validation_loss"],
        validation_error=best_row.get("validation_error"),
        test_loss=tested["test_loss"],
        test_error=tested.get("test_error"),
        seconds_per_epoch=_seconds_per_epoch(rows, len(data.train_dataloader())),
    )
    draw_curves({config.label: result.metrics()}, folder / "curves.png", loss_unit=config.loss_unit)
    write_text(folder / "result.json", json.dumps(result.as_json(), indent=2) + "\n")
    return result


def _further(config: TrainConfig, folder: Path) -> list[Callback]:
    """The callbacks of a run in addition to its metrics."""
    callbacks: list[Callback] = []
    if config.evaluate_every is not None or config.until_loss is not None:
        callbacks.append(
            ProgressFile(
                folder / "progress.csv",
                config.evaluate_every,
                config.until_loss,
                recalibrates=config.recalibrate,
            )
        )
    return [*callbacks, Recalibration()] if config.recalibrate else callbacks


def _seconds_per_epoch(rows: Sequence[Mapping[str, float]], batches: int) -> float:
    """The median over the epochs. The last epoch may have ended before its last batch."""
    first = rows[-2]["step"] if len(rows) > 1 else 0
    steps = rows[-1]["step"] - first
    last = rows[-1]["seconds"] * (batches / steps if steps < batches else 1)
    return median([*(row["seconds"] for row in rows[:-1]), last])


def evaluate_best(config: TrainConfig) -> dict[str, float]:
    """Tests a run as it was at its best epoch so far, even if it has not ended or has diverged.

    Args:
        config: What was trained.

    Returns:
        `test_loss`, and `test_error` where samples have classes.

    Raises:
        FileNotFoundError: No epoch has ended yet.
    """
    config = config.resolved()
    folder = Path(config.run_dir or ".")
    best = checkpoint(folder, "best")
    with quiet():
        module, data, trainer = _prepared(config, folder, [MetricsFile(folder / "metrics.csv")])
        (tested,) = trainer.test(module, data, ckpt_path=best, verbose=False)
    return dict(tested)


def _prepared(
    config: TrainConfig, folder: Path, callbacks: Sequence[Callback]
) -> tuple[GradientModule, DatasetModule, Trainer]:
    device = choose_device(config)
    dataset = load_data(config, device)
    module = _build_module(config, dataset, device)
    data = DatasetModule(dataset, config.batch_size, config.seed)
    return module, data, build_trainer(config, device, folder, callbacks)


def _build_module(
    config: TrainConfig, dataset: Dataset | Text | OwnData, device: torch.device
) -> GradientModule:
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same on every device
        torch.manual_seed(config.seed)
        model = _build_model(config, dataset)
    model.to(device)
    classes = dataset.has_classes
    loss = dataset.loss
    if config.credit == "token":
        assert isinstance(dataset, Text)
        loss = dataset.token_loss
    gradient = build_gradient(config, model, loss, has_classes=classes)
    rate = 1.0 if config.learning_rate == "auto" else config.learning_rate
    assert config.optimizer is not None
    optimizer = build_optimizer(config.optimizer, model.parameters(), rate)
    if config.learning_rate == "auto":
        assert isinstance(gradient, GradientEstimator)
        optimizer = AutoStep(optimizer, gradient)
    return GradientModule(model, gradient, optimizer, dataset.loss, classes)


def _build_model(config: TrainConfig, dataset: Dataset | Text | OwnData) -> nn.Module:
    if ":" in config.model:
        return own_model(config.model, dataset)
    if isinstance(dataset, Text):
        return language_model(config, dataset)
    assert isinstance(dataset, Dataset)
    return build_model(
        config.model,
        dataset.image_shape,
        dataset.num_classes,
        width=config.width,
        hidden_layers=config.hidden_layers,
    )
