"""Lightning's trainer, set up for one run: quiet, on one device, with checkpoints."""

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from multitangent_lab._errors import ConfigError
from multitangent_lab.config import TrainConfig
from multitangent_lab.training._callbacks import StopAgain

_KNOWN_WARNINGS = (
    r"Checkpoint directory .* is not empty",  # of course not, when a run is continued
    r"GPU available but not used",
    r"Be aware that when using `ckpt_path`, callbacks used",  # a comparison has one more
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning's use of torch
)


def build_trainer(
    config: TrainConfig, device: torch.device, folder: Path, callbacks: Sequence[Callback]
) -> Trainer:
    """Returns a trainer that stops early and keeps `checkpoints/best.ckpt` and `last.ckpt`."""
    stopping = EarlyStopping("validation_loss", patience=config.patience, check_finite=False)
    return Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        max_epochs=config.epochs,
        callbacks=[
            *callbacks,
            stopping,
            StopAgain(stopping),
            _checkpoint(folder, "best", monitor="validation_loss"),
            _checkpoint(folder, "last"),
        ],
        logger=_tensorboard(folder) if config.tensorboard else False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # gradients without a backward pass refuse its tensors
    )


def choose_device(config: TrainConfig) -> torch.device:
    """Returns where to compute.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    there_is_one = torch.cuda.is_available()
    if config.device == "cuda" and not there_is_one:
        raise ConfigError("`device` should be there. Found no CUDA device. Try device 'cpu'.")
    return torch.device("cuda" if there_is_one and config.device != "cpu" else "cpu")


@contextmanager
def interruptible() -> Iterator[None]:
    """Passes an interruption by the user on, which lightning turns into the end of the process."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps lightning from announcing devices and other products, and from known warnings."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)


class _Checkpoint(ModelCheckpoint):
    """Knows the best epoch also of a run whose folder was moved since."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = ("best_model_path", "last_model_path", "kth_best_model_path")
        moved = {name: self._here(state_dict[name]) for name in names if state_dict.get(name)}
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        here = {"dirpath": self.dirpath, "best_k_models": best}
        super().load_state_dict(state_dict | moved | here)

    def _here(self, path: str) -> str:
        return str(Path(self.dirpath or ".", Path(path).name))


def _checkpoint(folder: Path, name: str, monitor: str | None = None) -> ModelCheckpoint:
    return _Checkpoint(
        dirpath=folder / "checkpoints",
        filename=name,
        monitor=monitor,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )


def _tensorboard(folder: Path) -> TensorBoardLogger:
    try:
        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "`tensorboard` should be installed to write its files. Found no such package. "
            "Try: pip install tensorboard"
        ) from error
