"""What happens at the end of an epoch."""

from pathlib import Path
from time import perf_counter
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from multitangent_lab._files import write_csv
from multitangent_lab.training._module import GradientModule

COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "validation_loss",
    "validation_error",
    "seconds",
)


class MetricsFile(Callback):
    """Writes one row per epoch to a CSV file: `COLUMNS`.

    `seconds` is the time spent in training steps, without validation. The rows are part of
    every checkpoint, so that the file of a resumed run is that of one never interrupted.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._seconds += perf_counter() - self._start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured: dict[str, float] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "learning_rate": cast(GradientModule, pl_module).learning_rate,
        }
        measured |= {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append(measured | {"seconds": self._seconds})
        self._seconds = 0.0
        write_csv(self.path, self.rows, COLUMNS)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class StopAgain(Callback):
    """Stops a resumed run at once if early stopping had stopped it.

    Args:
        early_stopping: The callback that had.
    """

    def __init__(self, early_stopping: EarlyStopping) -> None:
        self.early_stopping = early_stopping

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.early_stopping.wait_count >= self.early_stopping.patience:
            trainer.should_stop = True
