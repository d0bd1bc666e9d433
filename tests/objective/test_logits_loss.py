"""The loss of logits, whatever the axes before them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multitangent.dual import DualTensor
from multitangent.objective import LogitsLoss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [True, False])
def test_equals_cross_entropy_with_the_classes_second(reduction: str, shift: bool) -> None:
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    labels = torch.randint(7, (3, 5))
    labels[0, 2:] = -100
    kept, wanted = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    right = F.cross_entropy(kept.movedim(-1, 1), wanted, reduction=reduction)
    found = LogitsLoss(shift=shift, reduction=reduction)(logits, labels)
    torch.testing.assert_close(found, right)


def test_tangents_are_those_of_the_loss() -> None:
    logits, labels = torch.randn(2, 4, 5, dtype=torch.float64), torch.randint(5, (2, 4))
    rows = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    found = LogitsLoss(shift=True)(DualTensor(logits, rows), labels)
    assert isinstance(found, DualTensor)
    for tangent, jvp in zip(rows, found.tangents, strict=True):
        right = torch.func.jvp(lambda x: LogitsLoss(shift=True)(x, labels), (logits,), (tangent,))
        torch.testing.assert_close(jvp, right[1])


def test_takes_several_axes_and_probabilities() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(5, (2, 3, 4))
    right = F.cross_entropy(logits.reshape(-1, 5), labels.flatten())
    torch.testing.assert_close(LogitsLoss()(logits, labels), right)
    probabilities = torch.rand(2, 5).softmax(1)
    right = F.cross_entropy(logits[:, 0, 0], probabilities)
    torch.testing.assert_close(LogitsLoss()(logits[:, 0, 0], probabilities), right)


def test_labels_of_other_axes_are_refused() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (3, 2))
    with pytest.raises((ValueError, RuntimeError)):
        LogitsLoss()(logits, labels)
    with pytest.raises(ValueError, match=r"logits \[B, T, classes\].*Found \[2, 3, 5\] and \[3, 2"):
        LogitsLoss(shift=True)(logits, labels)
    with pytest.raises(ValueError, match=r"Found \[3, 5\]"):
        LogitsLoss(shift=True)(torch.randn(3, 5), torch.randint(5, (3,)))
