"""Sets in which a model keeps tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multitangent import ForwardGradient, SimulatedGradient
from multitangent.gradient import DifferenceGradient
from multitangent.objective import Objective
from multitangent.tangents import Normal


class Counts(nn.Module):
    """It counts its runs in a tensor inside a set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.kept = {torch.zeros(())}

    @property
    def count(self) -> Tensor:
        return next(iter(self.kept))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.layer(x) * self.count.clone()


def test_tensors_in_sets_are_put_back():
    model = Counts()
    count = model.count
    with Objective(model, nn.MSELoss()).preserved():
        model(torch.ones(2, 3))
        model.kept.clear()
    assert model.count is count
    assert float(count) == 0


@pytest.mark.parametrize("perturb", ["weights", "activations"])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient, DifferenceGradient])
def test_a_step_is_one_run(kind, perturb):
    model, x, y = Counts(), torch.ones(2, 3), torch.zeros(2, 2)
    loss = kind(model, nn.MSELoss(), Normal(3), perturb=perturb, micro_batch=1)(x, y)
    torch.testing.assert_close(loss, model.layer(x).square().mean().detach())
    assert float(model.count) == 1
