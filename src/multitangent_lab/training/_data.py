"""A data set, as a configuration names it, for lightning."""

import torch
from lightning.pytorch import LightningDataModule

from multitangent_lab._factories import call_factory
from multitangent_lab.config import TrainConfig, check_sources
from multitangent_lab.data import (
    Batches,
    Data,
    Dataset,
    OwnData,
    Samples,
    Text,
    first_images,
    load_dataset,
    load_text,
    own_data,
)


def load_data(config: TrainConfig, device: torch.device) -> Dataset | Text | OwnData:
    """Returns the data that `config`, resolved, names.

    Raises:
        ConfigError: The user's own factory can not be called, or text or code have changed since
            the configuration was resolved.
        DataError: The data can not be had.
    """
    check_sources(config)
    if config.data is not None:
        return first_images(own_data(call_factory("data", config.data), device), config.images)
    if config.dataset == "text":
        text = load_text(
            config.data_file, level=config.level, context=config.context, device=device
        )
        return first_images(text, config.images)
    return first_images(load_dataset(config.dataset, config.data_dir, device=device), config.images)


class DatasetModule(LightningDataModule):
    """Hands the parts of a data set to a trainer, batch by batch.

    Args:
        dataset: The data set.
        batch_size: Samples per training step.
        seed: Seed of the order of the training samples.
    """

    def __init__(self, dataset: Data, batch_size: int, seed: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> Batches:
        return Batches(self.dataset.train, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> Batches:
        return self._in_order(self.dataset.validation)

    def test_dataloader(self) -> Batches:
        return self._in_order(self.dataset.test)

    def _in_order(self, part: Samples) -> Batches:
        batch_size = self.dataset.evaluation_batch or self.batch_size
        return Batches(part, batch_size, shuffle=False, seed=0)
