"""A data set, for lightning."""

from lightning.pytorch import LightningDataModule

from multitangent_lab.data import Batches, Dataset, Split


class DatasetModule(LightningDataModule):
    """Hands the parts of a data set to a trainer, batch by batch.

    Args:
        dataset: The data set.
        batch_size: Samples per training step.
        seed: Seed of the order of the training samples.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> Batches:
        return Batches(self.dataset.train, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> Batches:
        return _in_order(self.dataset.validation)

    def test_dataloader(self) -> Batches:
        return _in_order(self.dataset.test)


def _in_order(split: Split) -> Batches:
    return Batches(split, batch_size=1000, shuffle=False, seed=0)
