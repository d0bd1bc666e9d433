"""Lightning: a module with manual optimisation takes its gradients from forward mode."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from multitangent import ForwardGradient, Normal, Projection


class ForwardModule(LightningModule):
    """A classifier whose training step fills ``.grad`` by itself."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning would call loss.backward()
        self.model = model
        self.gradient = ForwardGradient(model, loss, Normal(16), Projection())

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.log("loss", self.gradient(*batch), on_step=False, on_epoch=True)
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        print(f"epoch {self.current_epoch}  loss {self.trainer.callback_metrics['loss']:.3f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.3)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["gradient"] = self.gradient.state_dict()  # the seed, and the count of the steps

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.gradient.load_state_dict(checkpoint["gradient"])


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    data = TensorDataset(x, x[:, :3].argmax(1))
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ForwardModule(model, nn.CrossEntropyLoss()), DataLoader(data, batch_size=32))


if __name__ == "__main__":
    main()
