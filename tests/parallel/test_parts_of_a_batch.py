"""A process that has some of the samples knows that there are others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from multitangent import Normal, Weights
from multitangent.engine import ForwardMode
from multitangent.objective import Objective
from multitangent.tangents import Stream, Tangents


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return self.scale * (output - target).square().mean(1)


@pytest.mark.parametrize(("others", "loss"), [(0, Scaled()), (4, Scaled()), (4, nn.MSELoss())])
def test_parameters_of_a_loss_need_all_samples(others, loss):
    objective = Objective(nn.Linear(3, 2), loss)
    batch = objective.batch(
        torch.randn(4, 3),
        torch.randn(4, 2),
        lambda own, weight: (replace(own, batch_size=own.size + others), weight + others),
    )
    tangents = Tangents(Normal(2), Stream(0, 0))
    run = Weights().bind(objective)(batch, Stream(0, 0), tangents)
    ForwardMode(4)(run, tangents)
    gradients = tangents.combine(torch.ones(2))
    if others and isinstance(loss, Scaled):
        with pytest.raises(NotImplementedError, match="`loss` should have no parameters"):
            run.pullback(gradients)
    else:
        assert len(run.pullback(gradients)) == 2 + isinstance(loss, Scaled)


def test_dropout_takes_the_rows_of_its_samples():
    objective = Objective(nn.Dropout(0.5), nn.MSELoss())
    whole = objective.batch(torch.ones(6, 50), torch.ones(6, 50))
    outputs = []
    for part in (whole, *whole.split(2)):
        with objective.mode(part, Stream(3, 1), "update"):
            outputs.append(objective.output(part))
    torch.testing.assert_close(torch.cat(outputs[1:]), outputs[0])
