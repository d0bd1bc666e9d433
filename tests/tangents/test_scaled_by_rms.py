"""ScaledByRMS: tangents as long as the gradient at each position."""

from __future__ import annotations

import pytest
import torch
from guess_laws import LOSS, gradient_blocks, same_training
from torch import nn

from models_for_tests import build
from multitangent import (
    Activations,
    ForwardGradient,
    LocalLoss,
    Mean,
    Normal,
    OwnValue,
)
from multitangent.tangents import Needs, RunningMean, ScaledByRMS


@pytest.mark.parametrize("spread", [0.1, 0.5])
@pytest.mark.parametrize("maps", [False, True], ids=["tokens", "maps"])
def test_they_find_the_position_that_counts(spread, maps):
    """Of four tokens, or four cells of a feature map, the output depends on the first."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower = nn.Conv2d(3, 5, 1) if maps else nn.Linear(3, 5)
            self.upper = nn.Linear(5, 3)

        def forward(self, x):
            h = self.lower(x)
            return self.upper(h[:, :, 0, 0] if maps else h[:, 0])

    torch.manual_seed(0)
    model = First().double()
    x = torch.randn(8, *((3, 2, 2) if maps else (4, 3))).double()
    y = torch.randint(0, 3, (8,))
    source = ScaledByRMS(Normal(30), spread=spread)  # so many that the gradient is exact
    gradient = ForwardGradient(model, LOSS, source, perturb=Activations(output="exact"))
    gradient(x, y)
    (block,) = gradient_blocks(gradient, x, y)
    rows = block.rows().squeeze(1)  # [K, C, H, W] or [K, T, D]
    plain = Normal(30).draw(block.request).squeeze(1)
    scale = (rows / plain).mean(1 if maps else 2).mean(0).flatten()
    # All of the energy is the first position's, but for what is spread over four.
    rest = (spread / 4 / (1 - spread + spread / 4)) ** 0.5
    torch.testing.assert_close(scale, torch.tensor([1.0, rest, rest, rest]).double())


def test_tangents_of_values_without_positions_are_what_they_were():
    """Such as those of linear layers, and weights."""
    model, x, y, _ = build("mlp")
    for perturb in (Activations(), "weights"):
        one, other = (
            (ForwardGradient, source, Mean(), perturb, {})
            for source in (ScaledByRMS(Normal(3)), Normal(3))
        )
        assert same_training(model, one, other, x, y)


@pytest.mark.parametrize("inner", [Normal(2), LocalLoss(), RunningMean(), Normal(1) + OwnValue()])
def test_a_description_knows_the_guesses_inside(inner):
    source = ScaledByRMS(inner)
    assert source.guesses == inner.guesses == source.init().guesses
    assert source.init().needs(0) == inner.init().needs(0) | Needs.UPDATE
