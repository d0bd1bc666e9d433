"""LocalLoss: guesses from small heads."""

from __future__ import annotations

import torch
from guess_laws import LOSS, gradient_blocks, trained
from torch import nn

from models_for_tests import build
from multitangent import (
    ForwardGradient,
    LocalLoss,
    Normal,
)


def test_local_loss_guesses_the_gradient_of_its_own_heads():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + LocalLoss(2, learning_rate=0.1))
    trained(gradient, x, y, 20)
    state = gradient.state_dict()["tangents"]["1"]
    head = next(iter(state["heads"].values()))
    block = gradient_blocks(gradient, x, y)[0]
    value = block.request.primal.requires_grad_()
    logits = value @ head["weight"].T + head["bias"]
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), value)
    torch.testing.assert_close(block.rows()[2], expected)
    assert loss.mean() < 0.7 * torch.tensor(3.0).log()  # the heads learn
