"""What `load_dataset` returns: the right pixels, split by the seed alone, normalised by `train`."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import Server, idx_files, md5
from torch import Tensor

from multitangent_lab.data import DATASET_NAMES, DataError, Dataset, Split, load_dataset
from multitangent_lab.data import _raw as raw
from multitangent_lab.data._files import Source
from multitangent_lab.data._holdout import holdout


def install(
    monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, files: dict[str, bytes]
) -> None:
    """Puts `files` into the data directory in place of the published ones."""
    published: Source = getattr(raw, name)
    source = Source(published.folder, {n: md5(c) for n, c in files.items()}, addresses=())
    assert source.checksums.keys() == published.checksums.keys()
    monkeypatch.setattr(raw, name, source)
    (directory / source.folder).mkdir()
    for file, content in files.items():
        (directory / source.folder / file).write_bytes(content)


@pytest.fixture
def images() -> Tensor:
    """250 different images, whose first pixel is their index."""
    images = torch.randint(256, (250, 4, 3), generator=torch.Generator().manual_seed(1))
    images[:, 0, 0] = torch.arange(250)
    return images.to(torch.uint8)


@pytest.fixture(params=["mnist", "fashion-mnist"])
def idx_name(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    images: Tensor,
) -> str:
    """The name of a data set of 200 images to train and 50 to test, installed in `tmp_path`."""
    name: str = request.param
    source = name.upper().replace("-", "_")
    install(monkeypatch, tmp_path, source, idx_files(images[:200], images[200:]))
    return name


def pixels(dataset: Dataset, split: Split, white: int = 255) -> Tensor:
    """The pixels before normalisation."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (dataset.mean, dataset.std))
    return ((split.images * std + mean) * white).round().to(torch.uint8)


def indices(dataset: Dataset, split: Split) -> list[int]:
    return pixels(dataset, split)[:, 0, 0, 0].tolist()


def test_every_image_is_there_once_with_its_label(
    idx_name: str, tmp_path: Path, images: Tensor
) -> None:
    dataset = load_dataset(idx_name, tmp_path, validation=40)
    assert dataset.name == idx_name
    assert dataset.image_shape == (1, 4, 3)
    train, validation, test = (
        indices(dataset, split) for split in (dataset.train, dataset.validation, dataset.test)
    )
    assert (len(train), len(validation), len(test)) == (160, 40, 50)
    assert sorted(train + validation) == list(range(200))
    assert test == list(range(200, 250))
    for split, where in ((dataset.train, train), (dataset.validation, validation)):
        assert torch.equal(pixels(dataset, split)[:, 0], images[where])
        assert split.labels.tolist() == [i % 10 for i in where]
        assert split.labels.dtype == torch.int64


def test_normalisation_is_that_of_the_training_part_alone(
    idx_name: str, tmp_path: Path, images: Tensor
) -> None:
    dataset = load_dataset(idx_name, tmp_path, validation=40, dtype=torch.float64)
    kept = images.numpy()[indices(dataset, dataset.train)].astype(np.float64) / 255
    assert dataset.mean == pytest.approx([kept.mean()], rel=1e-14)
    assert dataset.std == pytest.approx([kept.std()], rel=1e-14)
    expected = (kept - kept.mean()) / kept.std()
    assert np.allclose(dataset.train.images[:, 0], expected, rtol=1e-13, atol=1e-13)
    expected = (images[200:].numpy() / 255 - kept.mean()) / kept.std()
    assert np.allclose(dataset.test.images[:, 0], expected, rtol=1e-13, atol=1e-13)


def test_cifar_is_read_channel_by_channel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    records = torch.randint(256, (60, 3073), generator=generator).to(torch.uint8)
    records[:, 0] = torch.arange(60) % 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    content = [part.numpy().tobytes() for part in records.reshape(6, 10, 3073)]
    install(monkeypatch, tmp_path, "CIFAR10", dict(zip(names, content, strict=True)))

    dataset = load_dataset("cifar10", tmp_path, validation=0)
    assert dataset.image_shape == (3, 32, 32)
    assert len(dataset.validation) == 0
    assert dataset.train.labels.tolist() == [i % 10 for i in range(50)]
    found = torch.cat([pixels(dataset, split) for split in (dataset.train, dataset.test)])
    for record, image in zip(records, found, strict=True):
        for channel, start in enumerate((1, 1025, 2049)):  # red, green, blue
            assert torch.equal(image[channel].flatten(), record[start : start + 1024])
    plain = dataset.train.images.double()
    assert plain.mean((0, 2, 3)).abs().max() < 1e-7
    assert (plain.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-7


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits", dtype=torch.float64)
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split) for split in splits] == [1150, 288, 359]
    found = sorted(
        (label, image.flatten().tolist())
        for split in splits
        for label, image in zip(
            split.labels.tolist(), pixels(dataset, split, white=16), strict=True
        )
    )
    bunch = load_digits()
    expected = zip(bunch.target.tolist(), bunch.data.astype(int).tolist(), strict=True)
    assert found == sorted(expected)
    assert dataset.train.images.mean().abs() < 1e-12
    assert (dataset.train.images.std(correction=0) - 1).abs() < 1e-12


def test_split_is_a_function_of_the_seed_alone() -> None:
    first = load_dataset("digits", seed=3)
    torch.manual_seed(99)
    with torch.device("meta"):
        again = load_dataset("digits", seed=3)
    other = load_dataset("digits", seed=4)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).images, getattr(again, part).images)
        assert torch.equal(getattr(first, part).labels, getattr(again, part).labels)
    assert not torch.equal(first.validation.labels, other.validation.labels)
    assert torch.equal(first.test.labels, other.test.labels)


def test_split_is_pinned() -> None:
    labels = torch.arange(40) % 4
    assert holdout(labels, 8, seed=0).nonzero().flatten().tolist() == [1, 4, 7, 10, 11, 14, 21, 28]


@pytest.mark.parametrize("size", [0, 1, 7, 50, 99, 100])
@pytest.mark.parametrize("seed", range(5))
def test_holdout_has_its_size_and_every_class_in_proportion(size: int, seed: int) -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    mask = holdout(labels, size, seed)
    assert mask.sum() == size
    for label, count in ((0, 60), (1, 30), (2, 10)):
        share = count * size / 100
        assert math.floor(share) <= int(mask[labels == label].sum()) <= math.ceil(share)


def test_every_sample_is_held_out_equally_often() -> None:
    # 400 draws of 20 out of 100: each sample Binomial(400, 0.2), 80 +- 8, so within 5 sigma.
    labels = torch.arange(100) % 10
    often = torch.stack([holdout(labels, 20, seed) for seed in range(400)]).sum(0)
    assert 40 < often.min() <= often.max() < 120


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_are_rounded_once(dtype: torch.dtype) -> None:
    images = load_dataset("digits", dtype=dtype).train.images
    exact = load_dataset("digits", dtype=torch.float64).train.images
    assert images.dtype == dtype
    half_unit = torch.finfo(dtype).eps / 2
    spare = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((images.double() - exact).abs() <= (half_unit + spare) * exact.abs()).all()


@pytest.mark.parametrize(
    ("name", "close"),
    [("fashion_mnist", "fashion-mnist"), ("CIFAR-10", "cifar10"), ("MNIST", "mnist"), ("x", "di")],
)
def test_unknown_name_lists_the_known_ones(name: str, close: str) -> None:
    known = ", ".join(DATASET_NAMES)
    message = f"`name` should be one of {known}. Found '{name}'. Try '{close}"
    with pytest.raises(DataError, match=f"^{message}"):
        load_dataset(name)


@pytest.mark.parametrize("validation", [-1, 1438, 0.2])
def test_validation_that_does_not_fit(validation: int) -> None:
    message = rf"from 0 to 1437, to hold out of 1438\. Found {validation}\. Try the default, 288"
    with pytest.raises(DataError, match=message):
        load_dataset("digits", validation=validation)


def test_download_reaches_the_data_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server, images: Tensor
) -> None:
    files = idx_files(images[:200], images[200:])
    server.files = {f"/{name}": content for name, content in files.items()}
    sums = {name: md5(content) for name, content in files.items()}
    monkeypatch.setattr(raw, "MNIST", Source("mnist", sums, (server.address,)))
    with pytest.raises(DataError, match="not tried, because download=False"):
        load_dataset("mnist", tmp_path, validation=40, download=False)
    assert len(load_dataset("mnist", tmp_path, validation=40).train) == 160
    assert len(load_dataset("mnist", tmp_path, validation=40, download=False).train) == 160
    assert len(server.asked) == 4
