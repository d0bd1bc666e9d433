"""How good a run's gradients were, epoch by epoch, beside the true ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from multitangent import NonFiniteError
from multitangent.gradient import Assessment, GradientEstimator
from multitangent_lab._files import write_csv
from multitangent_lab.training._module import GradientModule

COLUMNS = ("epoch", "quantity", "place", "value")


class QualityFile(Callback):
    """Assesses the gradient of the first batch of every epoch, before the step: `COLUMNS`.

    Quantities are `cosine`, with the true gradient, of the parameters of a site (of all for the
    place `all`), and `captured`, the share of the gradient's squared length that a source's
    tangents hold. Several estimates add `cosine_of_mean`, the cosine of their mean, `limit`, the
    limit of this cosine where it can be estimated, and `estimates`, their number. Backpropagation
    and batches whose values are not finite are not assessed. The rows are part of every checkpoint.

    Args:
        path: The file.
        estimates: The number of estimates of the batch to average.
    """

    def __init__(self, path: Path, estimates: int = 1) -> None:
        self.path = path
        self.estimates = estimates
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        gradient = cast(GradientModule, pl_module).gradient
        if batch_idx > 0 or not isinstance(gradient, GradientEstimator):
            return
        images, labels = cast(tuple[Tensor, Tensor], batch)
        try:
            assessment = gradient.assess(images, labels, repeats=self.estimates)
        except NonFiniteError:
            return  # the step will say so
        epoch = trainer.current_epoch + 1
        self.rows += [{"epoch": epoch, **row} for row in self._rows(assessment)]
        write_csv(self.path, self.rows, COLUMNS)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def _rows(self, found: Assessment) -> list[dict[str, Any]]:
        tables: dict[str, Mapping[str, float | None]] = {
            "cosine": {"all": found.cosine, **found.cosines},
            "captured": found.captured,
        }
        if self.estimates > 1:
            tables |= {
                "cosine_of_mean": {"all": found.cosine_of_mean, **found.cosines_of_mean},
                "limit": {"all": found.limit, **found.limits},
                "estimates": {"all": found.estimates},
            }
        return [
            {"quantity": quantity, "place": place, "value": value}
            for quantity, table in tables.items()
            for place, value in table.items()
            if value is not None
        ]
