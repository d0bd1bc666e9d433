"""The published files themselves, where a data directory has them."""

import os
from pathlib import Path

import pytest
import torch

from multitangent_lab.data import _raw as raw
from multitangent_lab.data import load_dataset
from multitangent_lab.data._files import Source


@pytest.mark.parametrize(
    ("name", "source", "shape", "sizes", "test_histogram", "mean", "std"),
    [
        (
            "mnist",
            raw.MNIST,
            (1, 28, 28),
            (50_000, 10_000, 10_000),
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            [0.1307],
            [0.3081],
        ),
        (
            "fashion-mnist",
            raw.FASHION_MNIST,
            (1, 28, 28),
            (50_000, 10_000, 10_000),
            [1000] * 10,
            [0.2860],
            [0.3530],
        ),
        (
            "cifar10",
            raw.CIFAR10,
            (3, 32, 32),
            (40_000, 10_000, 10_000),
            [1000] * 10,
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
        ),
    ],
    ids=["mnist", "fashion-mnist", "cifar10"],
)
def test_published_data_set(
    name: str,
    source: Source,
    shape: tuple[int, int, int],
    sizes: tuple[int, int, int],
    test_histogram: list[int],
    mean: list[float],
    std: list[float],
) -> None:
    directory = os.environ.get("MULTITANGENT_DATA")
    if not directory or not Path(directory, source.folder).is_dir():
        pytest.skip(f"no published {name} files: set MULTITANGENT_DATA to a folder that has them")
    dataset = load_dataset(name, directory, download=False)

    splits = (dataset.train, dataset.validation, dataset.test)
    assert tuple(len(split) for split in splits) == sizes
    assert dataset.image_shape == shape
    for split in splits:
        assert split.images.shape == (len(split), *shape)
    assert dataset.test.labels.bincount().tolist() == test_histogram
    # Every class is held out in its proportion.
    train, validation = (split.labels.bincount() for split in splits[:2])
    share = (train + validation) * (sizes[1] / (sizes[0] + sizes[1]))
    assert (validation - share).abs().max() < 1
    # The widely used constants are those of all training images, four digits of them.
    assert dataset.mean == pytest.approx(mean, abs=1e-3)
    assert dataset.std == pytest.approx(std, abs=1e-3)
    means = dataset.train.images.mean((0, 2, 3), dtype=torch.float64)
    assert means.abs().max() < 1e-6
