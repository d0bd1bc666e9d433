"""Engines on the same runs: they find the same derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models_for_tests import MODELS, build
from multitangent import Activations, Feedback, Normal, Weights
from multitangent.engine import Backpropagation, ForwardMode, run_few
from multitangent.objective import Objective
from multitangent.tangents import Stream, Tangents
from pairwise import pairwise

PERTURBATIONS = [Activations(), Activations(share="sample", output="exact"), Weights()]
TABLE = pairwise(list(MODELS), PERTURBATIONS, [ForwardMode(1), ForwardMode(4), ForwardMode(100)])


def derivatives(engine, perturb, model, x, y, source):
    objective = Objective(model, nn.CrossEntropyLoss())
    batch, stream = objective.batch(x, y), Stream(1, 2)
    tangents = Tangents(source, stream)
    return engine(perturb.bind(objective)(batch, stream, tangents), tangents)


@pytest.mark.parametrize(("name", "perturb", "engine"), TABLE)
def test_forward_mode_finds_what_backpropagation_finds(name, perturb, engine):
    model, x, y, _ = build(name)
    losses, jvps, _ = derivatives(engine, perturb, model, x, y, Normal(3))
    expected = derivatives(Backpropagation(), perturb, model, x, y, Normal(3))
    torch.testing.assert_close(losses, expected.losses)
    torch.testing.assert_close(jvps, expected.jvps, rtol=1e-9, atol=1e-12)
    assert jvps.shape == ((3,) if perturb == Weights() else (3, 6))


@pytest.mark.parametrize("engine", [ForwardMode(2), ForwardMode(100), Backpropagation()])
def test_the_derivatives_of_the_output_are_found_for_those_who_need_them(engine):
    model, x, y, _ = build("mlp")
    source = (Normal(2) + Feedback()).init()
    found = derivatives(engine, Activations(), model, x, y, source)
    assert found.output_tangents.shape == (3, 6, 3)
    # The loss depends on the values through the output alone: d = <dL/dz, dz>.
    logits = model(x).detach().requires_grad_()
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    (error,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close((found.output_tangents * error).sum(2), found.jvps)
    assert derivatives(engine, Activations(), model, x, y, Normal(2)).output_tangents is None


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
def test_a_size_is_tried_without_a_trace(perturb):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4000), nn.BatchNorm1d(4000), nn.Linear(4000, 3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    objective = Objective(model, nn.CrossEntropyLoss())
    batch = objective.batch(torch.randn(640, 5), torch.zeros(640, dtype=torch.int64))
    sizes = [
        run_few(perturb.bind(objective), objective, batch, Stream(0, 0), Normal(k)).micro_batch
        for k in (1, 16)
    ]
    # 20 MiB hold the tangents of 4000 values of 4 bytes each for 1310 samples, and for 81.
    assert sizes == [640, 64]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
