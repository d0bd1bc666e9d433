"""The training step, for lightning."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from multitangent import AutoStep, NonFiniteError
from multitangent_lab._errors import NonFiniteLoss
from multitangent_lab.data import Batches, Loss
from multitangent_lab.training._named_gradients import Gradient


class GradientModule(LightningModule):
    """Trains a model with any gradient, in lightning's manual optimization.

    Logs `train_loss`, the mean over the epoch's samples of the loss at each step, and
    `validation_loss` and `test_loss`, means over samples. Where samples have classes it logs the
    share of wrong answers as `validation_error` and `test_error`. Checkpoints contain the state of
    the gradient.

    Args:
        model: From inputs to what the loss takes, such as logits `[B, classes]`.
        gradient: `ForwardGradient(model, ...)` or what behaves like it.
        optimizer: An optimizer of the model's parameters.
        loss: From outputs and targets to one number per sample, or to their mean.
        has_classes: Whether answers are right or wrong.

    Raises:
        NonFiniteLoss: While training or validating, if the loss becomes infinite or NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        gradient: Gradient,
        optimizer: Optimizer,
        loss: Loss,
        has_classes: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.gradient = gradient
        self.optimizer = optimizer
        self.loss = loss
        self.has_classes = has_classes

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        if isinstance(self.optimizer, AutoStep):
            return self.optimizer.learning_rate or 0.0
        return float(self.optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer

    def on_train_epoch_start(self) -> None:
        cast(Batches, self.trainer.train_dataloader).set_epoch(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        optimizer = cast(Optimizer, self.optimizers())
        optimizer.zero_grad()
        try:
            loss = self.gradient(*batch)
        except NonFiniteError as error:
            self._check_finite("train_loss", self.loss(self.model(batch[0]), batch[1]).mean())
            raise self._not_finite("derivatives of train_loss", "other values") from error
        self._log("train_loss", loss, batch)
        optimizer.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate("validation", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        outputs = self.model(inputs)
        self._log(f"{name}_loss", self.loss(outputs, targets).mean(), batch)
        if self.has_classes:
            self._log(f"{name}_error", (outputs.argmax(1) != targets).float().mean(), batch)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Returns `validation_loss`, and `validation_error` where samples have classes.

        Lightning's validation logs the same values. The model stays in its mode.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        losses, errors, count = 0.0, 0.0, 0
        try:
            for inputs, targets in batches:
                outputs = self.model(inputs)
                loss = self.loss(outputs, targets).mean()
                self._check_finite("validation_loss", loss)
                losses += loss.item() * len(targets)
                if self.has_classes:
                    errors += int((outputs.argmax(1) != targets).sum())
                count += len(targets)
        finally:
            for module, training in modes:
                module.training = training
        found = {"validation_loss": losses / count}
        return found | ({"validation_error": errors / count} if self.has_classes else {})

    def _log(self, name: str, value: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        self._check_finite(name, value)
        self.log(name, value, on_step=False, on_epoch=True, batch_size=len(batch[1]))

    def _check_finite(self, name: str, value: Tensor) -> None:
        if not value.isfinite():
            raise self._not_finite(name, str(value.item()))

    def _not_finite(self, name: str, value: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"`{name}` should be finite. Found {value} in epoch {self.current_epoch + 1}, step "
            f"{self.global_step + 1}. Try a lower --learning-rate."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradient"] = self.gradient.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gradient.load_state_dict(checkpoint["gradient"])
