"""Validation losses against steps and time, within epochs too."""

from collections.abc import Iterable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from multitangent_lab._files import write_csv
from multitangent_lab.training._module import GradientModule
from multitangent_lab.training._statistics import recalibrate

COLUMNS = (
    "epoch",
    "step",
    "seconds",
    "processor_seconds",
    "validation_loss",
    "validation_error",
)


class ProgressFile(Callback):
    """Writes a row before the first step, every so many steps and after every epoch: `COLUMNS`.

    `epoch` counts parts of epochs too. `seconds` is the time of the training steps so far, without
    validations. `processor_seconds` is their processor time in all threads of this process. Other
    work on the machine hardly changes it. The rows are part of every checkpoint. The run stops at
    the first validation loss that is low enough.

    Args:
        path: The file.
        every: Steps between two validations; None for epochs alone.
        until: The validation loss at which to stop; None for none.
        recalibrates: Whether batch normalisation takes its statistics anew before a validation.
    """

    def __init__(
        self, path: Path, every: int | None, until: float | None, *, recalibrates: bool
    ) -> None:
        self.path = path
        self.every = every
        self.until = until
        self.recalibrates = recalibrates
        self.rows: list[dict[str, float]] = []
        self._spent = (0.0, 0.0)  # seconds on the clock, and of the processor
        self._start = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.rows:
            self._validate(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self._is_reached()

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = perf_counter(), process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = perf_counter(), process_time()
        steps = zip(self._spent, self._start, now, strict=True)
        seconds, of_processor = (spent + end - start for spent, start, end in steps)
        self._spent = seconds, of_processor
        is_due = self.every is not None and trainer.global_step % self.every == 0
        if is_due and not trainer.is_last_batch:  # the end of an epoch has a validation anyway
            self._validate(trainer, pl_module)
            trainer.should_stop = trainer.should_stop or self._is_reached()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows[-1]["step"] < trainer.global_step:
            measured = trainer.callback_metrics
            names = [name for name in COLUMNS if name in measured]
            self._append(trainer, {name: measured[name].item() for name in names})
        trainer.should_stop = trainer.should_stop or self._is_reached()

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = cast(GradientModule, pl_module), cast(Any, trainer).datamodule
        if self.recalibrates:
            batches = cast(Iterable[tuple[Tensor, Tensor]], trainer.train_dataloader)
            recalibrate(module.model, batches)
        self._append(trainer, module.validate(data.val_dataloader()))

    def _append(self, trainer: Trainer, measured: dict[str, float]) -> None:
        row = {
            "epoch": trainer.global_step / trainer.num_training_batches,
            "step": trainer.global_step,
            "seconds": self._spent[0],
            "processor_seconds": self._spent[1],
        }
        self.rows.append(row | measured)
        write_csv(self.path, self.rows, COLUMNS)

    def _is_reached(self) -> bool:
        return self.until is not None and self.rows[-1]["validation_loss"] <= self.until

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "spent": self._spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._spent = state_dict["rows"], state_dict["spent"]
