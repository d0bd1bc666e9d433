"""`LogitsLoss` with labels of several axes and of other types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multitangent.objective import LogitsLoss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2), (2, 4, 2), (2, 3, 2, 3), (2, 2)])
def test_the_next_labels_along_the_second_axis(shape, dtype, reduction, weighted):
    """`(2, 3, 2)`: one axis fewer and another one longer are equally many labels."""
    torch.manual_seed(0)
    logits = torch.randn(*shape, 7, dtype=torch.float64)
    labels = torch.randint(7, shape).to(dtype)
    loss = LogitsLoss(shift=True, reduction=reduction)
    loss.weight = torch.rand(7, dtype=torch.float64) if weighted else None
    found = loss(logits, labels)
    right = F.cross_entropy(
        logits[:, :-1].flatten(0, -2),
        labels[:, 1:].flatten().long(),
        weight=loss.weight,
        reduction=reduction,
    )
    if reduction == "none":
        assert found.shape == labels[:, 1:].shape
    torch.testing.assert_close(found.flatten(), right.flatten())
