"""What is left of a run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a run; errors are shares of wrong answers, losses means over samples.

    There is no error where samples have no classes, as those of a text.

    Args:
        run_dir: The folder with `config.toml`, `versions.json`, `metrics.csv`, `checkpoints/`,
            `curves.png` and `result.json`, which holds these fields.
        gradient: The gradient.
        num_tangents: K; None for backpropagation.
        learning_rate: The learning rate used.
        epochs: Epochs trained.
        best_epoch: The epoch with the lowest validation loss, which was tested.
        validation_loss: Its validation loss.
        validation_error: Its validation error; None where there is none.
        test_loss: Its test loss.
        test_error: Its test error; None where there is none.
        seconds_per_epoch: Median time that an epoch spent in training steps.
    """

    run_dir: Path
    gradient: str
    num_tangents: int | None
    learning_rate: float
    epochs: int
    best_epoch: int
    validation_loss: float
    validation_error: float | None
    test_loss: float
    test_error: float | None
    seconds_per_epoch: float

    def metrics(self) -> "DataFrame":
        """Returns `metrics.csv`: one row per epoch."""
        import pandas as pd

        return pd.read_csv(self.run_dir / "metrics.csv")

    def progress(self) -> "DataFrame":
        """Returns validation losses against steps and time: `progress.csv`, or a row per epoch.

        Columns are `epoch`, `step`, `seconds` of training so far, and `validation_loss`.
        """
        import pandas as pd

        if (self.run_dir / "progress.csv").exists():
            return pd.read_csv(self.run_dir / "progress.csv")
        table = self.metrics()
        return table.assign(seconds=table["seconds"].cumsum())

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self) | {"run_dir": str(self.run_dir)}


def read_result(folder: Path) -> TrainResult:
    """Returns the result stored in `folder`, wherever it was when the run finished."""
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return TrainResult(**stored | {"run_dir": folder})
