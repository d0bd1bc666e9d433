"""What modules keep is copied, compared and put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multitangent.objective import Change, SavedState

NAMES = [f"name {i}" for i in range(5)]


class Keeper(nn.Module):
    """A module that keeps one set, filled in a given order."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.kept: set[object] = set(names)


def test_sets_in_another_order_are_the_same() -> None:
    numbers = [0, 8, 16, 24]  # of one hash in a small set: their order is that of their arrival
    model = Keeper([])
    model.kept.update(numbers)
    before = SavedState([model])
    model.kept.clear()
    model.kept.update(reversed(numbers))
    assert list(model.kept) != numbers
    assert before.differing(SavedState([model]), 0.0) == []
    assert not Change(before)


@pytest.mark.parametrize("change", [{"add": "another"}, {"discard": NAMES[0]}, {"add": object()}])
def test_a_set_that_changed_is_found_and_put_back(change: dict[str, object]) -> None:
    model = Keeper(NAMES)
    before, kept = SavedState([model]), model.kept
    for method, item in change.items():
        getattr(kept, method)(item)
    assert before.differing(SavedState([model]), 0.0) == ["kept"]
    assert before.is_touched()
    assert Change(before)
    before.restore()
    assert model.kept is kept
    assert kept == set(NAMES)


def test_a_set_that_did_not_change_keeps_its_order() -> None:
    model = Keeper(NAMES)
    model.kept.update(str(i) for i in range(100))
    for i in range(100):
        model.kept.discard(str(i))
    order = list(model.kept)
    SavedState([model]).restore()
    assert list(model.kept) == order


def test_another_item_of_the_same_number_is_a_difference() -> None:
    model = Keeper(NAMES)
    before = SavedState([model])
    model.kept.remove(NAMES[0])
    model.kept.add("another")
    assert before.differing(SavedState([model]), 0.0) == ["kept"]


def test_tensors_in_lists_are_compared_by_their_numbers() -> None:
    model = nn.Module()
    model.kept = [torch.zeros(3), {"deep": torch.ones(2)}]  # type: ignore[assignment]
    before = SavedState([model])
    model.kept[1]["deep"].add_(1.0)  # type: ignore[index, union-attr, operator]
    assert before.differing(SavedState([model]), 0.0) == ["kept"]
    before.restore()
    assert torch.equal(model.kept[1]["deep"], torch.ones(2))  # type: ignore[index]
