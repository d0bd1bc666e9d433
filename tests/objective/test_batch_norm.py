"""Batch normalisation in training mode: statistics of the whole batch, constant along tangents."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import Activations, ForwardGradient, Normal, SimulatedGradient
from multitangent.tangents import StandardBasis

LOSS = nn.CrossEntropyLoss()
PERTURB = ["weights", "activations", Activations(share="sample"), Activations(recompute=True)]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5, affine=False, track_running_stats=False),
        nn.Linear(5, 3),
    ).double()
    return model, torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(3, (6,))


@pytest.mark.parametrize("perturb", PERTURB, ids=repr)
@pytest.mark.parametrize("micro_batch", ["auto", 1, 4, 6])
def test_equals_the_simulation_with_frozen_statistics_for_any_split(perturb, micro_batch):
    model, x, y = build()
    SimulatedGradient(model, LOSS, Normal(3), perturb=perturb)(x, y)
    expected = gradients(model)
    ForwardGradient(model, LOSS, Normal(3), perturb=perturb, micro_batch=micro_batch)(x, y)
    assert relative_error(gradients(model), expected) <= 1e-10


@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
@pytest.mark.parametrize("perturb", PERTURB, ids=repr)
@pytest.mark.parametrize("micro_batch", ["auto", 2, 6])
def test_running_averages_are_updated_once(kind, perturb, micro_batch):
    model, x, y = build()
    plain = copy.deepcopy(model)
    kind(model, LOSS, Normal(3), perturb=perturb, micro_batch=micro_batch)(x, y)
    plain(x)
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert int(model[0][1].num_batches_tracked) == 1


@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_coupled_statistics_give_the_gradient_of_backpropagation(perturb):
    """With as many tangents as there are perturbed numbers of the whole batch."""
    model, x, y = build()
    LOSS(model(x), y).backward()
    true = gradients(model)
    n = sum(p.numel() for p in model.parameters())
    perturb = Activations(share="sample") if perturb == "activations" else perturb
    if perturb == "weights":
        SimulatedGradient(model, LOSS, StandardBasis(n), perturb=perturb, statistics="coupled")(
            x, y
        )
        assert relative_error(gradients(model), true) <= 1e-10
    errors = {}
    for statistics in ("frozen", "coupled"):
        SimulatedGradient(model, LOSS, StandardBasis(n), perturb=perturb, statistics=statistics)(
            x, y
        )
        errors[statistics] = relative_error(gradients(model), true)
    assert errors["coupled"] <= 1e-10
    assert 0.05 < errors["frozen"] < 1


def test_running_statistics_are_no_approximation():
    model, x, y = build()
    model = nn.Sequential(*[m for m in model if not isinstance(m, nn.BatchNorm1d)]).eval()
    LOSS(model(x), y).backward()
    true = gradients(model)
    ForwardGradient(model, LOSS, StandardBasis(200))(x, y)
    assert relative_error(gradients(model), true) <= 1e-10
