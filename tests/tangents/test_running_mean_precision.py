"""The running mean of many samples in a type of low precision."""

import pytest
import torch
from torch import nn

from multitangent import ForwardGradient, Normal
from multitangent.gradient import step
from multitangent.tangents import RunningMean


@pytest.mark.parametrize("count", [64, 1024])
def test_samples_of_a_class_are_counted_without_rounding(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3)).to(torch.bfloat16)
    inputs, labels = torch.ones(count, 2, dtype=torch.bfloat16), torch.zeros(count).long()
    source = Normal(2) + RunningMean()
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), source, verify=False)
    observation = step(*gradient.prepare(inputs, labels)).observation
    assert observation is not None
    gradient(inputs, labels)
    found = gradient.state_dict()["tangents"]["1"]["means"]["0"][0].double()
    expected = 0.1 * observation.gradients["0"].double().mean(0)
    assert torch.allclose(found, expected, rtol=0.05, atol=1e-4)
