"""Data sets: digits, MNIST, Fashion-MNIST and CIFAR-10, texts, and the user's own."""

from multitangent_lab._errors import DataError
from multitangent_lab.data._batches import Batches
from multitangent_lab.data._datasets import Dataset, Split, first_images, load_dataset
from multitangent_lab.data._files import data_directory
from multitangent_lab.data._own import OwnData, own_data
from multitangent_lab.data._raw import DATASET_NAMES
from multitangent_lab.data._samples import Data, Loss, Samples
from multitangent_lab.data._text import Text, Windows, load_text, next_token_loss, next_token_losses

__all__ = [
    "DATASET_NAMES",
    "Batches",
    "Data",
    "DataError",
    "Dataset",
    "Loss",
    "OwnData",
    "Samples",
    "Split",
    "Text",
    "Windows",
    "data_directory",
    "first_images",
    "load_dataset",
    "load_text",
    "next_token_loss",
    "next_token_losses",
    "own_data",
]
