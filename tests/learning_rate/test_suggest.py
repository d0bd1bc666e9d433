"""Closed forms of learning rates, against what random tangents do."""

from __future__ import annotations

from math import inf

import pytest
import torch

from multitangent import Mean, Normal, Projection
from multitangent.aggregation import Rescaled, Sum, TopK
from multitangent.learning_rate import suggest
from multitangent_lab.functions import FUNCTIONS, Estimate

AGGREGATORS = (Sum(), Mean(), Projection(), Rescaled(Mean()), Rescaled(Projection()))


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
@pytest.mark.parametrize(("count", "dimension"), [(1, 8), (4, 8), (16, 8), (4, 64)])
def test_moments(aggregator, count, dimension):
    points = torch.randn(dimension, dtype=torch.float64).expand(1, 4000, -1)
    estimate = Estimate(Normal(count), aggregator)
    found = estimate(FUNCTIONS["sphere"], points, step=1)[0]
    true = 2 * points[0]
    squared = true[0].square().sum()
    along = (found * true).sum(1) / squared
    square = found.square().sum(1) / squared
    for sample, expected in (
        (along, aggregator.expected_alignment(count, dimension)),
        (square, aggregator.expected_squared_norm(count, dimension)),
    ):
        error = float(sample.std()) / 4000**0.5
        assert abs(float(sample.mean()) - expected) < 4 * error + 1e-9
        assert error < 0.05 * expected


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
def test_the_suggested_rate_decreases_a_sphere_most(aggregator):
    function, n, count = FUNCTIONS["sphere"], 16, 4
    points = torch.ones(1, 8000, n, dtype=torch.float64)
    step = Estimate(Normal(count), aggregator)(function, points, step=1)
    best = suggest(0.5, num_tangents=count, dimension=n, aggregator=aggregator)
    after = [float(function(points - r * best * step).mean()) for r in (0.8, 1.0, 1.25)]
    assert after[1] < after[0]
    assert after[1] < after[2]
    if isinstance(aggregator, Projection):  # K/n of the full decrease
        assert after[1] == pytest.approx(n * (1 - count / n), rel=0.02)


@pytest.mark.parametrize(
    ("aggregator", "headroom", "expected"),
    [
        (Projection(), 1, 0.1),
        (Projection(), 2, 0.2),
        (Projection(), inf, 0.1 * 64 / 16),
        (Mean(), 1, 0.1 * 16 / (64 + 16 + 1)),
        (Mean(), 3, 0.3 * 16 / (64 + 16 + 1)),
        (Mean(), inf, 0.1),
        (Sum(), 1, 0.1 / (64 + 16 + 1)),
    ],
)
def test_closed_forms(aggregator, headroom, expected):
    found = suggest(0.1, num_tangents=16, dimension=64, aggregator=aggregator, headroom=headroom)
    assert found == pytest.approx(expected)


def test_every_direction_makes_the_projection_the_gradient():
    assert suggest(0.1, num_tangents=9, dimension=8, headroom=inf) == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_rate": 0.0}, "`reference_rate` should be a positive number. Found 0.0"),
        ({"reference_rate": inf}, "`reference_rate` should be a positive number. Found inf"),
        ({"num_tangents": 0}, "`num_tangents` should be at least 1. Found 0"),
        ({"dimension": 0}, "`dimension` should be at least 1. Found 0"),
        ({"headroom": 0.5}, "`headroom` should be at least 1. Found 0.5"),
        ({"headroom": float("nan")}, "`headroom` should be at least 1. Found nan"),
    ],
)
def test_errors(arguments, message):
    usual = {"reference_rate": 0.1, "num_tangents": 4, "dimension": 8}
    with pytest.raises(ValueError, match=message):
        suggest(**usual | arguments)


def test_no_closed_form():
    with pytest.raises(
        NotImplementedError, match=r"known in closed form. Found TopK\(num_kept=1\)"
    ):
        suggest(0.1, num_tangents=4, dimension=8, aggregator=TopK(1))
