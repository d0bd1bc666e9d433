"""`Batches`: every sample once, in an order that is a function of seed and epoch."""

import pytest
import torch

from multitangent_lab.data import Batches, DataError, Split


@pytest.fixture
def split() -> Split:
    """Ten samples, which are their own labels."""
    labels = torch.arange(10)
    return Split(labels.float().reshape(10, 1, 1, 1), labels)


def orders(batches: Batches, epochs: range) -> list[list[list[int]]]:
    """The labels of every batch of every epoch."""
    result = []
    for epoch in epochs:
        batches.set_epoch(epoch)
        result.append([labels.tolist() for _, labels in batches])
    return result


def test_without_shuffle_the_order_is_that_of_the_split(split: Split) -> None:
    batches = Batches(split, 4, shuffle=False, seed=0)
    assert orders(batches, range(2)) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 2


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 10])
def test_every_sample_comes_once(
    split: Split, batch_size: int, shuffle: bool, drop_last: bool
) -> None:
    batches = Batches(split, batch_size, shuffle=shuffle, seed=0, drop_last=drop_last)
    found = list(batches)
    assert len(found) == len(batches)
    assert all(torch.equal(images.flatten(), labels.float()) for images, labels in found)
    sizes = [len(labels) for _, labels in found]
    assert sizes[:-1] == [batch_size] * (len(found) - 1)
    seen = sorted(label for _, labels in found for label in labels.tolist())
    left_out = 10 % batch_size if drop_last else 0
    assert len(seen) == len(set(seen)) == 10 - left_out


def test_order_depends_on_seed_and_epoch_alone(split: Split) -> None:
    first = orders(Batches(split, 3, shuffle=True, seed=1), range(4))
    torch.manual_seed(99)
    with torch.device("meta"):
        assert orders(Batches(split, 3, shuffle=True, seed=1), range(4)) == first
    batches = Batches(split, 3, shuffle=True, seed=1)
    assert orders(batches, range(1)) == orders(batches, range(1))
    # All different, also where seed + epoch is the same.
    seen = [orders(Batches(split, 10, shuffle=True, seed=seed), range(4)) for seed in range(4)]
    assert len({str(order) for run in seen for order in run}) == 16


def test_order_is_pinned(split: Split) -> None:
    first, second = orders(Batches(split, 10, shuffle=True, seed=0), range(2))
    assert first == [[4, 5, 6, 9, 3, 2, 1, 0, 7, 8]]
    assert second == [[2, 6, 1, 9, 4, 0, 8, 5, 7, 3]]


def test_resumed_run_sees_the_same_batches(split: Split) -> None:
    whole = orders(Batches(split, 3, shuffle=True, seed=7), range(6))
    resumed = orders(Batches(split, 3, shuffle=True, seed=7), range(4, 6))
    assert resumed == whole[4:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_changing_a_batch_leaves_the_split_alone(split: Split, shuffle: bool) -> None:
    for images, labels in Batches(split, 4, shuffle=shuffle, seed=0):
        images.zero_()
        labels.zero_()
    assert split.labels.tolist() == split.images.flatten().tolist() == list(range(10))


def test_empty_split_has_no_batches(split: Split) -> None:
    batches = Batches(Split(split.images[:0], split.labels[:0]), 4, shuffle=True, seed=0)
    assert len(batches) == 0
    assert list(batches) == []


def test_batch_size_that_does_not_fit(split: Split) -> None:
    with pytest.raises(DataError, match=r"`batch_size` should be at least 1\. Found 0\. Try"):
        Batches(split, 0, shuffle=False, seed=0)
    with pytest.raises(DataError, match=r"at most the 10 samples of the split.* Found 11\. Try"):
        Batches(split, 11, shuffle=False, seed=0, drop_last=True)
    assert len(Batches(split, 11, shuffle=False, seed=0)) == 1


def test_repr_shows_the_arguments(split: Split) -> None:
    assert repr(Batches(split, 4, shuffle=True, seed=0)) == (
        "Batches(split=Split(images=<(10, 1, 1, 1)>, labels=<(10,)>), batch_size=4, "
        "shuffle=True, seed=0, drop_last=False)"
    )
