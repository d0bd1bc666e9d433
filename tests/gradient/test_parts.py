"""With `verify="parts"` no more than two parts of a batch run at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multitangent import ForwardGradient, Normal
from multitangent.gradient import DifferenceGradient, GradientEstimator

KINDS = pytest.mark.parametrize("kind", [ForwardGradient, DifferenceGradient])


class Watched(nn.Module):
    """A linear layer that tells how many samples it sees at once."""

    def __init__(self, couples: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.layer.weight.data = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
        self.couples = couples

    def forward(self, x: Tensor) -> Tensor:
        seen(self, len(x))
        return self.layer(x - x.mean(0) if self.couples else x)


MOST: dict[int, int] = {}  # apart from the module, whose state would count


def seen(module: nn.Module, count: int) -> None:
    MOST[id(module)] = max(count, MOST.get(id(module), 0))


def taken(kind: type[GradientEstimator], model: nn.Module, micro_batch: int) -> list[Tensor]:
    model.zero_grad()
    MOST.clear()
    x, y = torch.arange(24.0).reshape(8, 3) / 8, torch.arange(8) % 2
    loss = nn.CrossEntropyLoss()
    kind(model, loss, Normal(4), None, "weights", micro_batch=micro_batch, verify="parts")(x, y)
    return [p.grad for p in model.parameters() if p.grad is not None]


@KINDS
def test_the_whole_batch_is_never_run(kind: type[GradientEstimator]) -> None:
    model = Watched(couples=False)
    parts = taken(kind, model, 2)
    assert MOST[id(model)] == 4
    whole = taken(kind, model, 8)
    assert MOST[id(model)] == 8
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


@KINDS
def test_samples_that_meet_are_found_in_two_parts(kind: type[GradientEstimator]) -> None:
    model = Watched(couples=True)
    with pytest.warns(UserWarning, match="splits what belongs together"):
        parts = taken(kind, model, 2)
    torch.testing.assert_close(parts, taken(kind, model, 8), rtol=1e-3, atol=1e-5)
