"""A data set: held-out parts, normalised, on a device."""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from multitangent_lab._errors import DataError
from multitangent_lab.data._holdout import holdout
from multitangent_lab.data._own import OwnData
from multitangent_lab.data._raw import DATASET_NAMES, Raw, read_raw
from multitangent_lab.data._samples import Loss
from multitangent_lab.data._text import Text


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Args:
        images: Normalised images, `[N, C, H, W]`.
        labels: Their classes, int64, `[N]`.
    """

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `indices`, `[B]`."""
        return self.images[indices], self.labels[indices]

    def first(self, count: int) -> "Split":
        """The first `count` samples, or all of them if there are fewer."""
        return Split(self.images[:count], self.labels[:count])

    def __repr__(self) -> str:
        images, labels = tuple(self.images.shape), tuple(self.labels.shape)
        return f"Split(images=<{images}>, labels=<{labels}>)"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    A normalised image is `(pixel - mean) / std`, channel by channel, where pixels run from 0
    (black) to 1 (white).

    Args:
        name: One of `DATASET_NAMES`.
        train: What to train on.
        validation: What was held out of the training images, to choose by.
        test: The test images, to report.
        num_classes: How many classes the labels 0, 1, ... stand for.
        image_shape: `(C, H, W)`.
        mean: Mean pixel of `train` per channel.
        std: Standard deviation (divided by the count, not the count less one) of the pixels of
            `train` per channel.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def loss(self) -> Loss:
        return nn.CrossEntropyLoss()

    @property
    def has_classes(self) -> bool:
        return True

    @property
    def evaluation_batch(self) -> int:
        return 1000


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    validation: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    download: bool = True,
) -> Dataset:
    """Loads a data set wholly into memory, normalised and not augmented.

    The validation images are drawn from the training images with every class in its proportion,
    as a function of `seed` alone. The test images are the published ones (digits has none: a
    fifth of all images, the same for every seed). Mean and standard deviation are those of the
    images left to train on, summed as integers and so exact.

    Args:
        name: `"digits"` (8x8 grey, embedded in scikit-learn: no files, no network), `"mnist"`,
            `"fashion-mnist"` (28x28 grey) or `"cifar10"` (32x32 colour).
        data_dir: The folder that holds `mnist/*.gz`, `fashion-mnist/*.gz` and
            `cifar-10-batches-bin/*.bin`. By default `$MULTITANGENT_DATA`, else the user's cache
            folder. Files are verified by checksum; missing ones are downloaded into it.
        validation: How many images to hold out; by default 10 000, for digits a fifth.
        seed: Chooses the validation images.
        device: Where the tensors live.
        dtype: The type of the images.
        download: Whether missing files may be downloaded.

    Returns:
        The data set: for digits 1150 images to train, 288 to validate and 359 to test, for
        MNIST 50 000, 10 000 and 10 000.

    Raises:
        DataError: The name is unknown, the folder is not one, a file is damaged or can neither
            be found nor downloaded, or `validation` does not fit.
        ImportError: scikit-learn (digits) or pooch (download, cache folder) is not installed.

    Examples:
        >>> from multitangent_lab.data import load_dataset
        >>> digits = load_dataset("digits")
        >>> digits.train
        Split(images=<(1150, 1, 8, 8)>, labels=<(1150,)>)
        >>> len(digits.validation), len(digits.test), digits.num_classes
        (288, 359, 10)
        >>> mean, std = digits.train.images.mean(), digits.train.images.std(correction=0)
        >>> abs(mean.item()) < 1e-6, abs(std.item() - 1) < 1e-6
        (True, True)
    """
    if name not in DATASET_NAMES:
        close = get_close_matches(name.lower(), DATASET_NAMES, n=1)
        raise DataError(
            f"`name` should be one of {', '.join(DATASET_NAMES)}. Found {name!r}. "
            f"Try {(close or DATASET_NAMES)[0]!r}."
        )
    raw = read_raw(name, data_dir, download=download)
    held_out = holdout(raw.labels, _validation_size(raw, validation), seed)
    images = raw.images[~held_out]
    _, channels, height, width = images.shape
    mean, std = _mean_and_std(images, raw.white)

    def split(images: Tensor, labels: Tensor) -> Split:
        work = torch.promote_types(dtype, torch.float32)  # low precision is rounded to once
        shift = torch.tensor(mean, dtype=work, device=device).mul(raw.white)[:, None, None]
        scale = torch.tensor(std, dtype=work, device=device).mul(raw.white)[:, None, None]
        pixels = images.to(device).to(work)
        return Split(pixels.sub_(shift).div_(scale).to(dtype), labels.to(device, torch.int64))

    return Dataset(
        name=name,
        train=split(images, raw.labels[~held_out]),
        validation=split(raw.images[held_out], raw.labels[held_out]),
        test=split(raw.test_images, raw.test_labels),
        num_classes=10,
        image_shape=(channels, height, width),
        mean=mean,
        std=std,
    )


_Data = TypeVar("_Data", Dataset, Text, OwnData)


def first_images(dataset: _Data, count: int | None) -> _Data:
    """Returns a data set with less to train on and to validate with; the test stays whole.

    Args:
        dataset: The data set, of images or other samples.
        count: How many training samples are left, and a quarter as many for validation: the first
            ones; images are in no order. All of them if there are fewer, or for `None`.

    Examples:
        >>> from multitangent_lab.data import load_dataset
        >>> fewer = first_images(load_dataset("digits"), 100)
        >>> len(fewer.train), len(fewer.validation), len(fewer.test)
        (100, 25, 359)
    """
    if count is None:
        return dataset
    train, validation = dataset.train.first(count), dataset.validation.first(-(-count // 4))
    return replace(dataset, train=train, validation=validation)


def _validation_size(raw: Raw, validation: int | None) -> int:
    size = raw.validation if validation is None else validation
    if not isinstance(size, int) or not 0 <= size < len(raw.labels):
        raise DataError(
            f"`validation` should be a number of images from 0 to {len(raw.labels) - 1}, to hold "
            f"out of {len(raw.labels)}. Found {size}. Try the default, {raw.validation}."
        )
    return size


def _mean_and_std(images: Tensor, white: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of uint8 images `[N, C, H, W]`."""
    mean, std = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).tolist()
        total = channel.numel()
        first = sum(count * value for value, count in enumerate(counts))
        second = sum(count * value**2 for value, count in enumerate(counts))
        mean.append(first / (total * white))
        std.append(math.sqrt(total * second - first**2) / (total * white))
    return tuple(mean), tuple(std)
