"""Every: guesses that are learned in some steps only."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from guess_laws import LOSS, gradient_blocks, same_training, trained
from torch import nn

from multitangent import (
    Activations,
    ControlVariate,
    Feedback,
    ForwardGradient,
    Normal,
    OwnValue,
    SimulatedGradient,
)
from multitangent.aggregation import Projection, SumOfGuesses, WhenLearning
from multitangent.engine import ForwardMode
from multitangent.tangents import Every, LocalLoss, LowRank, RunningMean, ScaledByRMS

ACTIVATIONS = Activations(share="sample", output="exact")
SOURCE = ScaledByRMS(Normal(2)) + Feedback(2) + OwnValue()
ORDERED = Feedback(2), OwnValue(), ScaledByRMS(Normal(2))
PLAIN = ScaledByRMS(Normal(2)) + Feedback(2)  # whose guesses may be used as they are
MEASURING = [ControlVariate(), Projection()]


def made():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    return model, torch.randn(8, 5).double(), torch.randint(0, 3, (8,))


def gradient_of(source, model, aggregator=None, perturb=ACTIVATIONS):
    return ForwardGradient(model, LOSS, source, aggregator or ControlVariate(), perturb, seed=3)


@pytest.mark.parametrize("aggregator", [*MEASURING, SumOfGuesses()], ids=repr)
def test_a_period_of_one_changes_nothing_but_the_order(aggregator):
    model, x, y = made()
    source, ordered = SOURCE, Feedback(2) + OwnValue() + ScaledByRMS(Normal(2))
    if isinstance(aggregator, SumOfGuesses):
        source, ordered = PLAIN, Feedback(2) + ScaledByRMS(Normal(2))
    arguments = aggregator, ACTIVATIONS
    one = ForwardGradient, Every(1, source), *arguments, {"seed": 3}
    other = ForwardGradient, ordered, *arguments, {"seed": 3}
    assert same_training(model, one, other, x, y)


@pytest.mark.parametrize(
    ("source", "aggregator"),
    [
        *product(
            [
                Every(2, SOURCE),
                LocalLoss() + Every(3, SOURCE),
                Every(3, Normal(2) + RunningMean()) + OwnValue(),
            ],
            MEASURING,
        ),
        *product([Every(2, PLAIN), LocalLoss() + Every(3, PLAIN)], [SumOfGuesses()]),
        (Every(3, Normal(2) + RunningMean()), WhenLearning(Projection())),
    ],
    ids=repr,
)
def test_equals_the_simulation(source, aggregator):
    model, x, y = made()
    kinds = ForwardGradient, SimulatedGradient
    both = [(kind, source, aggregator, ACTIVATIONS, {"seed": 3}) for kind in kinds]
    assert same_training(model, *both, x, y, steps=15)


def test_what_is_pushed_and_learned():
    model, x, y = made()
    gradient = gradient_of(Every(3, SOURCE), model)
    pushed, learned = [], []
    gradient.step = 3  # from 3 on every second step learns, from 6 on every third
    for _ in range(7):
        pushed.append(max(len(block.rows()) for block in gradient_blocks(gradient, x, y)))
        before = copy.deepcopy(gradient.state_dict()["tangents"])
        trained(gradient, x, y, 1)
        after = gradient.state_dict()["tangents"]
        learned.append(repr(before) != repr(after))
    assert pushed == [3, 5, 3, 5, 3, 3, 5]
    assert learned == [False, True, False, True, False, False, True]


def test_the_distance_grows_from_one_to_the_period():
    source = Every(3, SOURCE)
    learns = [step for step in range(16) if source.learns(step)]
    assert learns == [0, 1, 2, 4, 6, 9, 12, 15]
    assert source.settled == 6


def test_between_nothing_is_pushed_if_guesses_are_taken_as_they_are(monkeypatch):
    model, x, y = made()
    gradient = gradient_of(Every(2, PLAIN), model, SumOfGuesses())
    calls = []
    push = ForwardMode.__call__
    monkeypatch.setattr(
        ForwardMode, "__call__", lambda *args: calls.append(gradient.step) or push(*args)
    )
    trained(gradient, x, y, 12)
    assert sorted(set(calls)) == [0, 1, 2, 4, 6, 8, 10]


def test_weights_with_factors():
    model, x, y = made()
    gradient = gradient_of(
        Every(2, LowRank(2) + RunningMean()), model, Projection(), perturb="weights"
    )
    stored = [trained(gradient, x, y, 1) for _ in range(10)]
    assert stored[-1] < stored[0]
    redrawn_model, *_ = made()
    redrawn = ForwardGradient(
        redrawn_model, LOSS, gradient.tangents, Projection(), "weights", seed=3,
        store_tangents=False,
    )  # fmt: skip
    for loss in stored:
        torch.testing.assert_close(trained(redrawn, x, y, 1), loss)


def test_an_assessment_tells_its_sources_apart():
    model, x, y = made()
    gradient = gradient_of(LocalLoss() + Every(3, SOURCE), model)
    trained(gradient, x, y, 3)
    captured = gradient.assess(x, y).captured
    assert list(captured) == [repr(part) for part in (LocalLoss(), *ORDERED)] + ["all"]


def test_it_goes_on_from_a_saved_state():
    model, x, y = made()
    gradient = gradient_of(Every(3, SOURCE), model)
    trained(gradient, x, y, 2)
    gradient.step = 11
    other = gradient_of(Every(3, SOURCE), copy.deepcopy(model))
    other.load_state_dict(gradient.state_dict())
    torch.testing.assert_close(trained(other, x, y, 5), trained(gradient, x, y, 5))


@pytest.mark.parametrize("period", [0, -1, 2.0])
def test_a_period_that_is_none(period):
    with pytest.raises(ValueError, match="`period` should be an integer"):
        Every(period, SOURCE)


def test_a_source_without_guesses():
    with pytest.raises(ValueError, match=r"`inner` should have guesses.*Found Normal\("):
        Every(2, Normal(4))
