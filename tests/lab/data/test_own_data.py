"""A data set of the user's own: what is taken, what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from multitangent_lab.data import Batches, DataError, first_images, own_data

INPUTS, CLASSES = torch.randn(12, 3), torch.arange(12) % 4
PAIR = INPUTS, CLASSES
LOSS = nn.CrossEntropyLoss()


class Items(Dataset[tuple[Any, Any]]):
    """Items that are made one by one."""

    def __init__(self, item: Any = None, count: int = 12) -> None:
        self.item = item
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return (INPUTS[i], int(CLASSES[i])) if self.item is None else self.item


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([PAIR])


@pytest.mark.parametrize(
    "part",
    [PAIR, list(PAIR), TensorDataset(*PAIR), Items()],
    ids=lambda part: type(part).__name__,
)
def test_parts(part: Any) -> None:
    for returned in (
        (part, part, part, LOSS),
        [part, part, part, LOSS],
        SimpleNamespace(train=part, validation=part, test=part, loss=LOSS),
    ):
        data = own_data(returned)
        assert data.loss is LOSS
        assert data.has_classes
        batches = list(Batches(data.train, 5, shuffle=False, seed=0))
        assert [len(targets) for _, targets in batches] == [5, 5, 2]
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), INPUTS)
        assert torch.equal(torch.cat([targets for _, targets in batches]), CLASSES)
        fewer = first_images(data, 8)
        assert (len(fewer.train), len(fewer.validation), len(fewer.test)) == (8, 2, 12)


def test_answers_are_right_or_wrong_for_classes_only() -> None:
    assert not own_data(((INPUTS, INPUTS),) * 3 + (nn.MSELoss(),)).has_classes
    assert not own_data((PAIR,) * 3 + (lambda output, target: output.sum(1),)).has_classes
    tokens = INPUTS.long(), INPUTS.long()
    assert not own_data((tokens,) * 3 + (LOSS,)).has_classes


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "`data` should return .* Found an object of type NoneType. Try `return train"),
        ((PAIR, PAIR, LOSS), "Found a tuple of tuple, tuple, CrossEntropyLoss"),
        (SimpleNamespace(train=PAIR), "Found an object of type SimpleNamespace"),
        ((PAIR, PAIR, PAIR, "mse"), "`loss`, .* Found 'mse'. Try torch.nn.CrossEntropyLoss"),
        ((PAIR, PAIR, PAIR, nn.MSELoss), "`loss`, .* Found <class .*MSELoss'>"),
        ((PAIR, PAIR, PAIR, nn.MSELoss(reduction="sum")), r"Found MSELoss\(reduction='sum'\)"),
        ((PAIR, INPUTS, PAIR, LOSS), "`validation`, of what `data` returns.* of type Tensor"),
        ((PAIR, PAIR, (INPUTS, CLASSES[:3]), LOSS), r"`test`,.* shapes \[12, 3\] and \[3\]"),
        (((INPUTS[:0], CLASSES[:0]), PAIR, PAIR, LOSS), r"`train`,.* shapes \[0, 3\] and \[0\]"),
        (((INPUTS, CLASSES.tolist()), PAIR, PAIR, LOSS), "`train`,.* a tuple of Tensor, list"),
        ((Endless(), PAIR, PAIR, LOSS), "`train`,.* of type Endless. Try `torch.utils.data.Tensor"),
        ((Items(count=0), PAIR, PAIR, LOSS), "`train`,.* of type Items"),
        ((Items(INPUTS[0]), PAIR, PAIR, LOSS), "first item is an object of type Tensor"),
        ((Items(("text", 1)), PAIR, PAIR, LOSS), "first item is a tuple of str, int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(returned: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.compile(message)):
        own_data(returned)
