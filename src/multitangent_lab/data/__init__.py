"""Data sets, wholly in memory: digits, MNIST, Fashion-MNIST and CIFAR-10."""

from multitangent_lab._errors import DataError
from multitangent_lab.data._batches import Batches
from multitangent_lab.data._datasets import Dataset, Split, first_images, load_dataset
from multitangent_lab.data._raw import DATASET_NAMES

__all__ = [
    "DATASET_NAMES",
    "Batches",
    "DataError",
    "Dataset",
    "Split",
    "first_images",
    "load_dataset",
]
