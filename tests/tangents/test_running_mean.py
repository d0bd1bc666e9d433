"""RunningMean: guesses from the gradients of the steps before."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from guess_laws import LOSS

from models_for_tests import build, gradients
from multitangent import (
    ForwardGradient,
    Normal,
    Projection,
)
from multitangent.tangents import RunningMean


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_there_is_a_mean_for_each_class(decay):
    model, x, y, _ = build("mlp")
    y = torch.tensor([0, 0, 2, 2, 2, 0])
    noted = []

    @dataclass(frozen=True)
    class Noted(RunningMean):
        """Keeps the gradient of the first site in every step."""

        def init(self):
            means = super().init()
            update = means.update

            def note(observation):
                noted.append(next(iter(observation.gradients.values())))
                update(observation)

            means.update = note
            return means

    gradient = ForwardGradient(model, LOSS, Normal(2) + Noted(decay=decay))
    gradient(x, y)
    gradient(x, y)
    state = gradient.state_dict()["tangents"]["1"]
    (means, *_) = state["means"].values()
    first, second = (torch.stack([g[y == c].mean(0) for c in (0, 2)]) for g in noted)
    expected = (1 - decay) * (decay * first + second)
    torch.testing.assert_close(means, expected)
    assert state["labels"].tolist() == [0, 2]


def test_without_decay_it_is_the_last_gradient_of_weights():
    model, x, y, _ = build("mlp")
    source = Normal(2) + RunningMean(decay=0.0)
    gradient = ForwardGradient(model, LOSS, source, Projection(), "weights")
    for _ in range(30):  # on one batch, the projection only grows
        model.zero_grad()
        gradient(x, y)
    found = gradients(model)
    model.zero_grad()
    LOSS(model(x), y).backward()
    expected = gradients(model)
    along = sum((f * e).sum() for f, e in zip(found, expected, strict=True))
    norms = [sum(g.square().sum() for g in each).sqrt() for each in (found, expected)]
    # Each step adds what two new tangents find of the rest: a cosine of 0.73 after 30, where two
    # tangents alone have 0.16.
    assert along / (norms[0] * norms[1]) > 0.55
