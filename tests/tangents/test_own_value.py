"""OwnValue: the value itself as a tangent."""

from __future__ import annotations

import torch
from guess_laws import LOSS
from torch import nn

from multitangent import (
    ControlVariate,
    ForwardGradient,
    Normal,
    OwnValue,
)


def test_it_makes_the_growth_of_weights_exact():
    """<grad W, W> of every linear layer, where each has a tangent of its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False).double() for i, o in ((5, 6), (6, 4), (4, 3))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))

    def growth():
        return torch.stack([(layer.weight.grad * layer.weight).sum() for layer in layers]).detach()

    source = Normal(2) + OwnValue(3)
    ForwardGradient(model, LOSS, source, ControlVariate(0.5), seed=1)(x, y)
    found = growth()
    model.zero_grad()
    LOSS(model(x), y).backward()
    torch.testing.assert_close(found, growth())
    model.zero_grad()
    weights = ForwardGradient(model, LOSS, source, ControlVariate(0.5), "weights")
    weights(x, y)
    torch.testing.assert_close(weights.diagnostics.jvps[2:], found)
