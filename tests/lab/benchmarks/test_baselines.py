"""What a user would write computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import ForwardGradient, Normal
from multitangent_lab.benchmarks._baselines import PythonLoop, VmapJvp

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("kind", [PythonLoop, VmapJvp])
def test_the_baselines_compute_the_same(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(3, (6,))
    ForwardGradient(model, LOSS, Normal(3))(x, y)
    expected = gradients(model)
    kind(model, LOSS, Normal(3))(x, y)
    assert relative_error(gradients(model), expected) <= 1e-10
    assert int(model[1].num_batches_tracked) == 2
