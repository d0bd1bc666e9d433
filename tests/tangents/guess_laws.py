"""Training with guesses, and comparisons of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from models_for_tests import relative_error
from multitangent.gradient import step

LOSS = nn.CrossEntropyLoss()


def trained(gradient, x, y, steps):
    """Losses of some steps of descent; the gradient's model ends as they leave it."""
    optimizer = torch.optim.SGD(gradient.model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(gradient(x, y))
        optimizer.step()
    return torch.stack(losses)


def same_training(model, one, other, x, y, steps=4):
    """Whether two gradients train a model in the same way, memory and all."""
    weights = []
    for arguments in (one, other):
        kind, *rest, options = arguments
        again = copy.deepcopy(model)
        gradient = kind(again, LOSS, *rest, **options)
        trained(gradient, x, y, steps)
        weights.append([p.detach() for p in again.parameters()])
    return relative_error(*weights) <= 1e-8


def gradient_blocks(gradient, x, y):
    """The tangents that the next step draws."""
    return list(step(*gradient.prepare(x, y)).tangents.blocks.values())
