"""Progress bars on standard error, one per run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Provides a display of runs, which appears with the first of them."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}  {task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    try:
        yield progress
    finally:
        if progress.live.is_started:
            progress.stop()


class ProgressBar(Callback):
    """Shows a run in `progress`: epochs, training loss, validation error or loss.

    Args:
        progress: The display.
        label: What to call the run.
    """

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress = progress
        self.label = label

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.start()
        self.task = self.progress.add_task(
            self.label,
            total=int(trainer.num_training_batches) * (trainer.max_epochs or 0),
            completed=trainer.global_step,
            epoch=trainer.current_epoch,
            epochs=trainer.max_epochs,
            status="",
        )

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.task)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
        validated = (
            f"error {measured['validation_error']:.1%}"
            if "validation_error" in measured
            else f"validation {measured['validation_loss']:.3f}"
        )
        self.progress.update(
            self.task,
            epoch=trainer.current_epoch + 1,
            status=f"loss {measured['train_loss']:.3f}  {validated}",
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.update(self.task, total=trainer.global_step)
