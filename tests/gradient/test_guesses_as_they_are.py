"""Steps whose gradient is the sum of the guesses: no tangent is pushed, no Gram matrix computed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from models_for_tests import build
from multitangent import Activations, Feedback, ForwardGradient, Normal
from multitangent.aggregation import SumOfGuesses
from multitangent.gradient import step
from multitangent.tangents import (
    Every,
    Homogeneous,
    Normalized,
    Orthogonal,
    RunningMean,
    ScaledByRMS,
)

LOSS = nn.CrossEntropyLoss()
OWN = Activations(share="sample", output="exact")
BETWEEN = 5  # a step in which `Every(2, ...)` does not learn
SOURCES = {
    "one guess": Normal(3) + Homogeneous(Feedback()),
    "a guess for every site": Normal(2) + Homogeneous(Feedback(4)),
    "two guesses": Feedback() + Normal(2) + ScaledByRMS(Homogeneous(Feedback(step_size=1.0))),
    "mixed tangents": Orthogonal(4) + Feedback(),
    "mixed guesses": Normal(2) + Normalized(Feedback()),
    "in some steps": Every(2, Normal(3) + Homogeneous(Feedback())),
}


def made(source, perturb=OWN, **options):
    """A gradient that has learned in two steps."""
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), perturb, seed=3, **options)
    for _ in range(2):
        gradient(x, y)
    model.zero_grad()
    return gradient, x, y


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("perturb", [OWN, "weights", Activations(output="exact")], ids=str)
@pytest.mark.parametrize("store_tangents", [True, False])
def test_the_gradient_is_that_of_a_step_that_measures(source, perturb, store_tangents):
    if perturb == "weights":
        source = Every(2, Normal(2) + RunningMean())
    gradient, x, y = made(source, perturb, store_tangents=store_tangents)
    for gradient.step in (2, BETWEEN):
        problem, *rest = gradient.prepare(x, y)
        found, expected = step(problem, *rest), step(replace(problem, measures=True), *rest)
        assert expected.combination.gram.isfinite().all()
        assert set(found.gradients) == set(expected.gradients)
        for parameter, value in expected.gradients.items():
            torch.testing.assert_close(found.gradients[parameter], value)
        torch.testing.assert_close(found.losses, expected.losses)
        torch.testing.assert_close(
            found.combination.coefficients, expected.combination.coefficients
        )


def test_the_diagnostics_are_not_numbers():
    gradient, x, y = made(Every(1, Homogeneous(Feedback()) + Normal(2)))
    gradient.tangents = Homogeneous(Feedback())
    gradient(x, y)
    found = gradient.diagnostics
    assert found.gram.isnan().all()
    assert found.condition.isnan().all()
    assert found.effective_rank.isnan().all()
    assert found.gradient_norm.shape == (len(x),)


def test_a_guess_that_is_not_finite_is_refused():
    gradient, x, y = made(SOURCES["one guess"])
    matrices = gradient.state_dict()["tangents"]["1"]["0"]["matrices"]
    matrices["3"].fill_(torch.inf)
    with pytest.raises(ValueError, match=r"guesses of the gradient should be finite.* '3'"):
        gradient(x, y)


def test_no_guess_is_refused():
    model, x, y, _ = build("mlp")
    with pytest.raises(ValueError, match="should have guesses of the gradient among them"):
        ForwardGradient(model, LOSS, Normal(2), SumOfGuesses(), OWN)(x, y)


class AsksForTheGraph(nn.Module):
    """Asks its input whether it has a graph, behind modules that keep something."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.count = 0

    def forward(self, x):
        self.count += 1
        hidden = self.parts[1](self.parts[0](x))
        factor = 2.0 if hidden.requires_grad else 1.0
        return self.parts[3](self.parts[2](hidden) * factor)


def test_a_model_that_asks_for_its_graph_runs_once_as_with_backpropagation():
    torch.manual_seed(0)
    model, source = AsksForTheGraph(), Every(2, Normal(3) + Homogeneous(Feedback()))
    x, y = torch.randn(7, 5), torch.randint(3, (7,))
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), OWN)
    gradient.step = BETWEEN
    gradient(x, y)
    other = copy.deepcopy(model)
    value = gradient(x, y)
    torch.testing.assert_close(value, LOSS(other(x), y).detach())
    assert model.count == other.count
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
