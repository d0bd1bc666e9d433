"""Compiled steps with guesses, with what sources learn, and with dropout."""

from __future__ import annotations

import copy
import functools
import shutil
import warnings

import pytest
import torch
from torch import nn

from multitangent import (
    Activations,
    ControlVariate,
    ForwardGradient,
    LocalLoss,
    Normal,
    OwnValue,
    Projection,
)
from multitangent.aggregation import SumOfGuesses
from multitangent.tangents import (
    Every,
    Feedback,
    Rademacher,
    Residual,
    RunningMean,
    ScaledByRMS,
    StandardBasis,
    TangentSource,
)

LOSS = nn.CrossEntropyLoss()
OWN = Activations(share="sample", output="exact")
EXACT = Activations(output="exact")


def mlp(*inner):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), *inner, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def cnn():
    torch.manual_seed(0)
    layers = nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Dropout2d(0.4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).double()


CASES = {
    "dropout": (mlp(nn.Dropout(0.3)), Normal(3), Projection(), Activations()),
    "dropout of maps": (cnn(), Normal(3), Projection(), "weights"),
    "own tangents": (mlp(), Rademacher(3), Projection(), Activations(share="sample")),
    "basis": (mlp(), StandardBasis(19), Projection(), Activations()),
    "own values": (mlp(), Normal(3) + OwnValue(), Projection(), Activations()),
    "feedback": (mlp(nn.Dropout(0.3)), Normal(3) + Feedback(), ControlVariate(), OWN),
    "running mean": (mlp(), Normal(3) + RunningMean(), ControlVariate(), Activations()),
    "scaled": (cnn().eval(), ScaledByRMS(Normal(3)), Projection(), Activations()),
    "residual": (mlp(), Normal(2) + Residual(), ControlVariate(), EXACT),
    "no derivatives": (mlp(nn.Dropout(0.3)), Residual(), SumOfGuesses(), EXACT),
    "learning in some steps": (
        mlp(nn.Dropout(0.3)),
        Every(2, Normal(2) + Feedback()),
        ControlVariate(),
        OWN,
    ),
    "random in some steps": (mlp(), Every(2, Normal(2) + Residual()), ControlVariate(), EXACT),
    "many": (
        mlp(nn.Dropout(0.3)),
        Normal(2) + Feedback() + OwnValue() + RunningMean(),
        ControlVariate(),
        OWN,
    ),
}


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        yield x, torch.arange(12) % 3


def assert_compiled_steps_are_the_same(name, tolerance=1e-9):
    model, *options = CASES[name]
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    plain = ForwardGradient(model, LOSS, *options)
    compiled = ForwardGradient(twin, LOSS, *options, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`compile=True` is left out")
        for x, y in batches(4):
            model.zero_grad()
            twin.zero_grad()
            torch.testing.assert_close(compiled(x, y), plain(x, y))
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=tolerance, atol=tolerance)
            plain.step = compiled.step = max(8, plain.step)  # from which on not every step learns
    expected, found = plain.state_dict(), compiled.state_dict()
    torch.testing.assert_close(found["tangents"], expected["tangents"], rtol=1e-9, atol=1e-9)


def counted(monkeypatch, compile):
    """Whether the assumptions of graphs held, in the calls of what `compile` makes of them."""
    calls = []

    def of_graph(graph, dynamic):
        compiled = compile(graph)

        def run(*args):
            out = compiled(*args)
            calls.append(bool(out[0]))
            return out

        return run

    monkeypatch.setattr(torch, "compile", of_graph)
    return calls


@pytest.fixture
def taken(monkeypatch):
    """The same where nothing is compiled: graphs run as they were traced."""
    return counted(monkeypatch, lambda graph: graph)


@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_is_the_same_step(name, taken):
    assert_compiled_steps_are_the_same(name)
    assert len(taken) >= 4 and all(taken)  # one of them is the test of the graph


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++")
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_compiled_step_with_guesses_and_dropout_is_the_same_step(monkeypatch):
    taken = counted(monkeypatch, functools.partial(torch.compile, dynamic=False))
    assert_compiled_steps_are_the_same("feedback")
    assert len(taken) == 4 and all(taken)


def test_a_class_that_comes_for_the_first_time(taken):
    """The graph reports it, and the step is done without."""
    model, *options = CASES["running mean"]
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    plain = ForwardGradient(model, LOSS, *options)
    compiled = ForwardGradient(twin, LOSS, *options, compile=True)
    for step, (x, _) in enumerate(batches(5)):
        y = torch.arange(12) % (2 if step < 3 else 3)
        torch.testing.assert_close(compiled(x, y), plain(x, y))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
    assert taken.count(False) == 1
    assert len(compiled.state_dict()["tangents"]["1"]["labels"]) == 3


class OfTheStep(TangentSource):
    """Tangents that are drawn in a way of their own."""

    num_tangents = 3

    def draw(self, request):
        generator = torch.Generator().manual_seed(request.stream.step // 3)
        return torch.randn(3, 1, *request.shape, generator=generator, dtype=request.dtype)


@pytest.mark.parametrize("other", [None, OwnValue()], ids=repr)
def test_a_source_that_needs_nothing_may_draw_as_it_likes(other, taken):
    source = OfTheStep() if other is None else OfTheStep() + other
    model = mlp()
    twin = copy.deepcopy(model)
    plain, compiled = (
        ForwardGradient(each, LOSS, source, compile=wanted)
        for each, wanted in ((model, False), (twin, True))
    )
    for x, y in batches(5):
        torch.testing.assert_close(compiled(x, y), plain(x, y))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
    assert len(taken) == 6 and all(taken)


def test_a_step_that_is_only_looked_at_teaches_nothing(taken):
    model, *options = CASES["feedback"]
    gradient = ForwardGradient(copy.deepcopy(model), LOSS, *options, compile=True)
    for x, y in batches(3):
        gradient(x, y)
    before = gradient.state_dict()["tangents"]
    gradient.assess(x, y)
    torch.testing.assert_close(gradient.state_dict()["tangents"], before, rtol=0, atol=0)


@pytest.mark.parametrize("module", [nn.AlphaDropout(0.1), nn.RReLU()], ids=repr)
def test_random_numbers_of_a_module_of_its_own_are_named(module):
    gradient = ForwardGradient(mlp(module), LOSS, Normal(3), compile=True)
    (batch,) = batches(1)
    with pytest.warns(UserWarning, match="drawn while the model runs, in 2"):
        gradient(*batch)


def test_a_state_of_more_than_tensors_is_named():
    gradient = ForwardGradient(mlp(), LOSS, Normal(3) + LocalLoss(), compile=True)
    (batch,) = batches(1)
    with pytest.warns(UserWarning, match="has learned, which is not made of tensors alone"):
        gradient(*batch)
