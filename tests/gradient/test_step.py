"""The step as a function without effects."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from models_for_tests import build
from multitangent import Activations, Feedback, ForwardGradient, Normal, SimulatedGradient
from multitangent.gradient import step
from multitangent.tangents import Stream

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
@pytest.mark.parametrize("perturb", ["activations", "weights", Activations(recompute=True)])
def test_it_is_the_step_that_a_gradient_takes_next(kind, perturb):
    model, x, y, _ = build("dropout")
    gradient = kind(model, LOSS, Normal(3), perturb=perturb, seed=5)
    one, other = (step(*gradient.prepare(x, y)) for _ in range(2))
    assert all(p.grad is None for p in model.parameters())
    assert gradient.step == 0
    value = gradient(x, y)
    torch.testing.assert_close(value, one.losses.mean())
    for parameter in model.parameters():
        assert torch.equal(one.gradients[parameter], other.gradients[parameter])
        assert torch.equal(one.gradients[parameter], parameter.grad)


def test_it_teaches_a_source_nothing():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + Feedback())
    gradient(x, y)
    before = copy.deepcopy(gradient.state_dict()["tangents"])
    found = step(*gradient.prepare(x, y))
    assert found.observation is not None
    torch.testing.assert_close(gradient.state_dict()["tangents"], before)


def test_values_are_the_gradients_of_the_perturbed_values():
    model, x, y, n = build("mlp")
    problem, batch, _ = ForwardGradient(model, LOSS, Normal(n + 8)).prepare(x, y)
    found = step(problem, batch, Stream(0, 0))
    assert [list(v.shape) for v in found.values.values()] == [[6, 6], [6, 4], [6, 3]]
    logits = model(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(
        nn.functional.cross_entropy(logits, y, reduction="sum"), logits
    )
    torch.testing.assert_close(found.values["5"], expected, rtol=1e-6, atol=1e-8)


def test_gram_and_derivatives_of_other_processes_can_be_joined():
    """A reduction that doubles what was measured leaves the projection as it is."""
    model, x, y, _ = build("mlp")
    problem, batch, stream = ForwardGradient(model, LOSS, Normal(3)).prepare(x, y)
    doubled = replace(problem, reduce=lambda gram, jvps: (2 * gram, 2 * jvps))
    one, other = (step(p, batch, stream) for p in (problem, doubled))
    for parameter in model.parameters():
        torch.testing.assert_close(one.gradients[parameter], other.gradients[parameter])
