"""Finite differences as an engine: what it finds, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models_for_tests import MODELS, build
from multitangent import Activations, Feedback, Normal, Weights
from multitangent.engine import (
    Backpropagation,
    FiniteDifferences,
    ForwardMode,
    SplitError,
    default_epsilon,
)
from multitangent.objective import Objective
from multitangent.tangents import Stream, Tangents
from pairwise import pairwise

PERTURBATIONS = [Activations(), Activations(share="sample", output="exact"), Weights()]
ENGINES = [FiniteDifferences(None, size) for size in (1, 4, 100)]


def derivatives(engine, perturb, model, x, y, source, loss=None):
    objective = Objective(model, nn.CrossEntropyLoss() if loss is None else loss)
    batch, stream = objective.batch(x, y), Stream(1, 2)
    tangents = Tangents(source, stream)
    return engine(perturb.bind(objective)(batch, stream, tangents), tangents)


@pytest.mark.parametrize(
    ("name", "perturb", "engine"), pairwise(list(MODELS), PERTURBATIONS, ENGINES)
)
def test_differences_are_near_what_backpropagation_finds(name, perturb, engine):
    model, x, y, _ = build(name)
    losses, jvps, _ = derivatives(engine, perturb, model, x, y, Normal(3))
    expected = derivatives(Backpropagation(), perturb, model, x, y, Normal(3))
    torch.testing.assert_close(losses, expected.losses)
    torch.testing.assert_close(jvps, expected.jvps, rtol=1e-6, atol=1e-7)
    assert jvps.shape == ((3,) if perturb == Weights() else (3, 6))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_the_differences_of_the_output_are_found_for_those_who_need_them(engine):
    model, x, y, _ = build("mlp")
    source = (Normal(2) + Feedback()).init()
    found = derivatives(engine, Activations(), model, x, y, source)
    expected = derivatives(ForwardMode(100), Activations(), model, x, y, source)
    torch.testing.assert_close(
        found.output_tangents, expected.output_tangents, rtol=1e-6, atol=1e-7
    )
    assert derivatives(engine, Activations(), model, x, y, Normal(2)).output_tangents is None


def test_the_error_falls_with_the_square_of_the_step():
    model, x, y, _ = build("attention")
    expected = derivatives(Backpropagation(), Weights(), model, x, y, Normal(3)).jvps
    errors = []
    for epsilon in (1e-2, 1e-3):
        engine = FiniteDifferences(epsilon, 100)
        errors.append(
            (derivatives(engine, Weights(), model, x, y, Normal(3)).jvps - expected).norm()
        )
    assert 90 < errors[0] / errors[1] < 110


def test_the_default_step_suits_the_type():
    model, x, y, _ = build("heads", torch.float64)
    expected = derivatives(Backpropagation(), Weights(), model, x, y, Normal(1)).jvps
    assert default_epsilon(torch.float64) < default_epsilon(torch.float32) < 1e-3
    for factor, worst in ((1, 1e-7), (1e5, 1.0)):
        engine = FiniteDifferences(default_epsilon(torch.float64) * factor, 100)
        found = derivatives(engine, Weights(), model, x, y, Normal(1)).jvps
        assert (found - expected).abs() <= worst * expected.abs()
    assert default_epsilon(torch.float16) == default_epsilon(torch.bfloat16) == 1e-3
    with torch.autocast("cpu"):
        assert default_epsilon(torch.float32) == 1e-3


def test_parts_that_give_other_losses_are_noticed():
    model, x, y, _ = build("mlp")

    def loss(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none") * len(target)

    with pytest.raises(SplitError, match="differ from those of the whole"):
        derivatives(FiniteDifferences(None, 2), Weights(), model, x, y, Normal(2), loss)
