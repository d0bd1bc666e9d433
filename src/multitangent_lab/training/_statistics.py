"""Statistics of batch normalisation for validation, of the model as it is."""

from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from multitangent.objective import normalizes_batches
from multitangent_lab.training._module import GradientModule

_BATCHES = 20


class Recalibration(Callback):
    """Takes the statistics anew from training batches, after the last step of every epoch.

    That is before the validation, which Lightning runs within the epoch.

    Running averages lag behind a model that moves fast, which tells most where gradients hold the
    statistics constant: then nothing keeps activations from drifting in directions that batch
    normalisation takes out again while training.

    Source: "precise" statistics, Wu and Johnson, "Rethinking 'Batch' in BatchNorm", Section 3.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.is_last_batch:
            return
        batches = cast(Iterable[tuple[Tensor, Tensor]], trainer.train_dataloader)
        recalibrate(cast(GradientModule, pl_module).model, batches)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Sets running statistics to their means over some batches."""
    layers: list[Any] = [m for m in model.modules() if normalizes_batches(m) and m.momentum]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
    try:
        for images, _ in islice(batches, _BATCHES):
            model(images)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
