"""The sum of forward gradients."""

from __future__ import annotations

import pytest
import torch
from aggregator_laws import (
    assert_gram_matrices_broadcast,
    assert_never_points_away,
    assert_samples_are_independent,
    case,
)
from hypothesis import given, settings

from multitangent.aggregation import Sum

TABLE = [Sum()]


def test_pinned_values():
    gram, jvps = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([7.0, 3.0])
    torch.testing.assert_close(Sum()(gram, jvps), torch.tensor([7.0, 3.0]).double())


@given(case())
@settings(deadline=None, max_examples=60)
def test_never_points_away_from_the_gradient(problem):
    for aggregator in TABLE:
        assert_never_points_away(aggregator, problem)


@pytest.mark.parametrize("aggregator", TABLE, ids=repr)
def test_samples(aggregator):
    assert_samples_are_independent(aggregator)
    assert_gram_matrices_broadcast(aggregator)
