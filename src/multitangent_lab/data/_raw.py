"""The data sets as published: where they come from, and their pixels as integers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from multitangent_lab.data._files import Archive, Source, data_directory, read_files
from multitangent_lab.data._formats import parse_cifar, parse_idx
from multitangent_lab.data._holdout import holdout
from multitangent_lab.data._lab import import_lab


@dataclass(frozen=True, eq=False)
class Raw:
    """Pixels and labels, before the validation images are held out.

    Attributes:
        images: Training images, uint8, `[N, C, H, W]`.
        labels: Their classes, `[N]`.
        test_images: Test images, like `images`.
        test_labels: Their classes.
        white: The largest value a pixel can have.
        validation: How many training images are held out unless told otherwise.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    white: int
    validation: int


DATASET_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")

MNIST = Source(
    folder="mnist",
    checksums={
        "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
    },
    addresses=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

FASHION_MNIST = Source(
    folder="fashion-mnist",
    checksums={
        "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
    },
    addresses=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
)

CIFAR10 = Source(
    folder="cifar-10-batches-bin",
    checksums={
        "data_batch_1.bin": "sha1:aadd24acce27caa71bf4b10992e9e7b2d74c2540",
        "data_batch_2.bin": "sha1:c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
        "data_batch_3.bin": "sha1:1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
        "data_batch_4.bin": "sha1:aab85764eb3584312d3c7f65fd2fd016e36a258e",
        "data_batch_5.bin": "sha1:26e2849e66a845b7f1e4614ae70f4889ae604628",
        "test_batch.bin": "sha1:67eb016db431130d61cd03c7ad570b013799c88c",
    },
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    archive=Archive("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"),
)


def read_raw(name: str, data_dir: str | Path | None, *, download: bool) -> Raw:
    """Returns the data set `name` of `DATASET_NAMES`; see `load_dataset`."""
    match name:
        case "digits":
            return _read_digits()
        case "mnist":
            return _read_idx(MNIST, data_dir, download)
        case "fashion-mnist":
            return _read_idx(FASHION_MNIST, data_dir, download)
        case _:
            return _read_cifar10(data_dir, download)


def _read_digits() -> Raw:
    bunch = import_lab("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target)
    # No test set is published: a fifth, the same one whatever the seed of the run.
    test = holdout(labels, round(len(labels) / 5), seed=0)
    train = ~test
    return Raw(
        images[train],
        labels[train],
        images[test],
        labels[test],
        white=16,
        validation=round(int(train.sum()) / 5),
    )


def _read_idx(source: Source, data_dir: str | Path | None, download: bool) -> Raw:
    files = read_files(source, data_directory(data_dir), download=download)
    return Raw(
        parse_idx(files["train-images-idx3-ubyte.gz"])[:, None],
        parse_idx(files["train-labels-idx1-ubyte.gz"]),
        parse_idx(files["t10k-images-idx3-ubyte.gz"])[:, None],
        parse_idx(files["t10k-labels-idx1-ubyte.gz"]),
        white=255,
        validation=10_000,
    )


def _read_cifar10(data_dir: str | Path | None, download: bool) -> Raw:
    files = read_files(CIFAR10, data_directory(data_dir), download=download)
    parts = [parse_cifar(files[f"data_batch_{i}.bin"]) for i in range(1, 6)]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    test_images, test_labels = parse_cifar(files["test_batch.bin"])
    return Raw(images, labels, test_images, test_labels, white=255, validation=10_000)
