"""Data sets, wholly in memory: digits, MNIST, Fashion-MNIST and CIFAR-10."""

from multitangent.data._batches import Batches
from multitangent.data._datasets import Dataset, Split, first_images, load_dataset
from multitangent.data._errors import DataError
from multitangent.data._raw import DATASET_NAMES

__all__ = [
    "DATASET_NAMES",
    "Batches",
    "DataError",
    "Dataset",
    "Split",
    "first_images",
    "load_dataset",
]
