"""Steps whose gradient is the sum of the guesses: no tangent is pushed, no Gram matrix computed."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy
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
    TangentSource,
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
    """Asks a tensor whether it has a graph, behind what keeps something and draws numbers."""

    def __init__(self, writes=False):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.count = 0
        self.writes = writes

    def forward(self, x):
        self.count += 1
        if self.writes:
            x.mul_(2.0)
        hidden = self.parts[1](self.parts[0](x)) * (1 + random.random() + numpy.random.rand())
        factor = 2.0 if hidden.requires_grad else 1.0
        return self.parts[3](self.parts[2](hidden) * factor)


GUESSES = {
    "activations": (Every(2, Normal(3) + Homogeneous(Feedback())), OWN),
    "weights": (Every(2, Normal(3) + RunningMean()), "weights"),
}


@pytest.mark.parametrize(("source", "perturb"), GUESSES.values(), ids=GUESSES)
def test_a_model_that_asks_for_its_graph_runs_once_as_with_backpropagation(source, perturb):
    torch.manual_seed(0)
    model, x, y = AsksForTheGraph(), torch.randn(7, 5), torch.randint(3, (7,))
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), perturb)
    gradient(x, y)
    gradient.step = BETWEEN
    other = copy.deepcopy(model)
    values, following = [], []
    for take in (lambda: gradient(x, y), lambda: LOSS(other(x), y).detach()):
        random.seed(1)
        numpy.random.seed(1)
        values.append(take())
        following.append((random.random(), numpy.random.rand()))
    torch.testing.assert_close(*values)
    assert following[0] == following[1]
    assert model.count == other.count
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@pytest.mark.parametrize(("source", "perturb"), GUESSES.values(), ids=GUESSES)
def test_an_input_that_changes_before_the_second_run_is_refused(source, perturb):
    model = AsksForTheGraph(writes=True)
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), perturb, verify=False)
    gradient.step = BETWEEN
    with pytest.raises(RuntimeError, match="`model` should leave its input as it is"):
        gradient(torch.randn(7, 5), torch.randint(3, (7,)))


class Kept(TangentSource):
    """One guess for every weight, which the source keeps."""

    num_tangents = 1
    guesses = (True,)

    def __init__(self):
        self.kept = {}

    def draw(self, request):
        return self.kept.setdefault(request.name, torch.ones(1, 1, *request.shape).double())


def test_gradients_are_no_part_of_what_a_source_keeps():
    model, x, y, _ = build("mlp")
    source = Kept()
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), "weights", verify=False)
    for _ in range(2):
        gradient(x, y)
    assert all(bool((value == 1).all()) for value in source.kept.values())
    assert all(bool((p.grad == 2).all()) for p in model.parameters())


class Shortened(Kept):
    """Guesses that are shortened where they are long."""

    def mixing(self, gram, dimension):
        return torch.diag_embed(2 / gram.diagonal().sqrt()) if bool((gram > 4).any()) else None


def test_guesses_that_are_mixed_if_they_are_long():
    model, x, y, _ = build("mlp")
    ForwardGradient(model, LOSS, Shortened(), SumOfGuesses(), "weights", verify=False)(x, y)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(2.0).double())


def test_guesses_are_added_in_the_type_of_the_gradients():
    gradient, x, y = made(SOURCES["two guesses"], tangent_dtype=torch.bfloat16)
    gradient.step = BETWEEN
    problem, *rest = gradient.prepare(x, y)
    found, expected = step(problem, *rest), step(replace(problem, measures=True), *rest)
    for parameter, value in expected.gradients.items():
        torch.testing.assert_close(found.gradients[parameter], value)


def test_a_sample_without_activity_has_no_guess_along_its_value():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.constant_(model[0].bias, -10.0)
    nn.init.constant_(model[2].bias, 2e4)
    sites = Activations(sites=["1", "2"], share="sample", output="exact")
    gradient = ForwardGradient(
        model, nn.MSELoss(), SOURCES["in some steps"], SumOfGuesses(), sites, verify=False
    )
    gradient.step = BETWEEN
    gradient(torch.rand(16, 4), torch.full((16, 1), 5e4))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
