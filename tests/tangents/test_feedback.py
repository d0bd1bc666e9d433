"""Feedback: guesses from the error at the output."""

from __future__ import annotations

import pytest
import torch
from guess_laws import LOSS
from torch import nn

from models_for_tests import build, gradients, relative_error
from multitangent import (
    Activations,
    Feedback,
    ForwardGradient,
    Normal,
    Projection,
)


@pytest.mark.parametrize("share", ["batch", "sample"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_feedback_becomes_the_jacobian_of_a_linear_model(share, rate):
    """Every row of J is found: the gradient is exact, with fewer tangents than dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 9), nn.Linear(9, 3)).double()
    x, y = torch.randn(32, 5).double(), torch.randint(0, 3, (32,))
    perturb = Activations(share=share, output="exact")
    source = Normal(2) + Feedback(step_size=rate, gated=False)
    gradient = ForwardGradient(model, LOSS, source, Projection(), perturb)
    for _ in range(600):
        model.zero_grad()
        gradient(x, y)
    found = gradients(model)
    matrices = gradient.state_dict()["tangents"]["1"]["matrices"]
    torch.testing.assert_close(matrices["1"], model[2].weight.detach())
    torch.testing.assert_close(matrices["0"], (model[2].weight @ model[1].weight).detach())
    model.zero_grad()
    LOSS(model(x), y).backward()
    assert relative_error(found, gradients(model)) < 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_gated_feedback_follows_the_output(gated):
    """Two kinds of samples, told apart by the output, whose Jacobians differ."""
    torch.manual_seed(0)

    class TwoKinds(nn.Module):
        """J = W + sign W' with a sign that the output shows."""

        def __init__(self):
            super().__init__()
            self.lower, self.upper = nn.Linear(5, 12), nn.Linear(12, 3)
            self.other = nn.Linear(12, 3).requires_grad_(False)

        def forward(self, x):
            sign = x[:, :1].sign()
            h = self.lower(x)
            shown = 8 * sign * torch.tensor([1.0, -1.0, 0.0])
            return self.upper(h) + sign * self.other(h) + shown

    model = TwoKinds().double()
    x, y = torch.randn(64, 5).double(), torch.randint(0, 3, (64,))
    source = Normal(2) + Feedback(gated=gated)
    perturb = Activations(sites=["lower", "upper"], share="sample")
    gradient = ForwardGradient(model, LOSS, source, perturb=perturb)
    for _ in range(400):
        gradient(x, y)
    held = gradient.assess(x, y).captured[repr(Feedback(gated=gated))]
    assert held > 0.99 if gated else held < 0.9


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["numbers", "sequences"])
def test_feedback_from_outputs_of_any_shape(shape):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower, self.upper = nn.Linear(4, 5), nn.Linear(5, 6 if shape else 1)

        def forward(self, x):
            return self.upper(self.lower(x)).reshape(len(x), *shape)

    def loss(output, target):
        return (output.reshape(len(output), -1).sum(1) - target).square()

    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randn(16)
    perturb = Activations(share="sample")
    gradient = ForwardGradient(Shaped(), loss, Normal(2) + Feedback(), perturb=perturb)
    for _ in range(100):
        gradient(x, y)
    assert gradient.assess(x, y).cosine > 0.9


@pytest.mark.parametrize("share", ["batch", "sample"])
def test_gated_feedback_is_no_worse_for_one_jacobian(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 3)).double()
    x, y = torch.randn(32, 5).double(), torch.randint(0, 3, (32,))
    perturb = Activations(share=share, output="exact")
    gradient = ForwardGradient(model, LOSS, Normal(2) + Feedback(), Projection(), perturb)
    for _ in range(600):
        gradient(x, y)
    assert gradient.assess(x, y).cosine > 1 - 1e-4


def test_feedback_learns_from_every_sample_at_once():
    """K B = 128 random tangents a step for n = 20: one step tells most, 20 all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 3)).double()
    x, y = torch.randn(64, 5).double(), torch.randint(0, 3, (64,))

    def error(share, steps):
        perturb = Activations(share=share, output="exact")
        source = Normal(2) + Feedback(gated=False)
        gradient = ForwardGradient(model, LOSS, source, Projection(), perturb)
        for _ in range(steps):
            gradient(x, y)
        learned = gradient.state_dict()["tangents"]["1"]["matrices"]["0"]
        return ((learned - model[1].weight).norm() / model[1].weight.norm()).item()

    assert error("sample", 20) < 1e-3
    assert error("batch", 20) > 0.1


def test_feedback_alone_learns_nothing():
    model, x, y, _ = build("mlp")
    with pytest.raises(ValueError, match=r"random tangents beside it, .*Normal\(2\)"):
        ForwardGradient(model, LOSS, Feedback())(x, y)
