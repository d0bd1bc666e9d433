"""Steps that measure where the source learns, and take guesses as they are elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import Activations, ControlVariate, Feedback, ForwardGradient, Normal, Projection
from multitangent.aggregation import SumOfGuesses, WhenLearning
from multitangent.engine import ForwardMode
from multitangent.tangents import (
    Every,
    Homogeneous,
    OwnValue,
    Residual,
    RunningMean,
    ScaledByRMS,
)

LOSS = nn.CrossEntropyLoss()
OWN = Activations(share="sample", output="exact")
SOURCES = {
    "feedback": Every(2, Normal(3) + Homogeneous(Feedback())),
    "running mean": Every(2, Normal(3) + RunningMean()),
}


def made(source, aggregator, step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    gradient = ForwardGradient(model, LOSS, copy.deepcopy(source), aggregator, OWN, seed=1)
    x, y = torch.randn(7, 5).double(), torch.randint(3, (7,))
    gradient(x, y)  # it has learned something
    gradient.step = step
    model.zero_grad()
    return gradient, x, y


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("inner", [ControlVariate(), Projection()], ids=repr)
@pytest.mark.parametrize(("step", "learns"), [(0, True), (8, True), (9, False)])
def test_it_is_the_one_or_the_other(source, inner, step, learns, monkeypatch):
    pushed = []
    push = ForwardMode.__call__
    monkeypatch.setattr(ForwardMode, "__call__", lambda *a: pushed.append(a) or push(*a))
    gradient, x, y = made(source, WhenLearning(inner), step)
    pushed.clear()
    gradient(x, y)
    assert bool(pushed) == learns
    found = gradients(gradient.model)
    expected, x, y = made(source, WhenLearning(inner), step)
    expected.aggregator = inner if learns else SumOfGuesses()
    expected(x, y)
    assert relative_error(found, gradients(expected.model)) <= 1e-12


DIRECTIONS = {
    "value": Every(2, Normal(2) + Feedback() + OwnValue()),
    "scaled": Normal(2) + ScaledByRMS(OwnValue()),
}


@pytest.mark.parametrize("aggregator", [SumOfGuesses(), WhenLearning(ControlVariate())], ids=repr)
@pytest.mark.parametrize("source", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_guess_that_is_a_direction_only_is_refused(source, aggregator):
    with pytest.raises(ValueError, match="`tangents` should have guesses as long as the gradient"):
        made(source, aggregator, 0)
    made(source, ControlVariate(), 0)


def test_a_direction_inside_of_homogeneous_guesses():
    made(Normal(2) + Homogeneous(Feedback() + OwnValue()), SumOfGuesses(), 0)


def test_tokens_are_refused_before_the_first_step():
    perturb = Activations(credit="token", output="exact")
    source = Every(2, Normal(3) + Feedback())
    with pytest.raises(ValueError, match=r"`aggregator` should measure .* WhenLearning"):
        ForwardGradient(nn.Linear(3, 3), LOSS, source, WhenLearning(Projection()), perturb)


@pytest.mark.parametrize(("source", "learns"), [(RunningMean(), True), (Residual(), False)])
def test_a_source_that_learns_always_or_never(source, learns):
    gradient, x, y = made(Normal(2) + Homogeneous(source), WhenLearning(Projection()), 5)
    gradient(x, y)
    assert bool(gradient.diagnostics.jvps.isfinite().all()) == learns
