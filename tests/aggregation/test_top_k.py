"""The tangents that point along the gradient best."""

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

from multitangent.aggregation import TopK

TABLE = [TopK(1), TopK(3)]


@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_it_keeps_at_least_one(number):
    with pytest.raises(ValueError, match="`num_kept` should be an integer"):
        TopK(number)


def test_pinned_values():
    gram, jvps = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([7.0, 3.0])
    torch.testing.assert_close(TopK(1)(gram, jvps), torch.tensor([7.0, 0.0]).double())


@given(case())
@settings(deadline=None, max_examples=60)
def test_never_points_away_from_the_gradient(problem):
    for aggregator in TABLE:
        assert_never_points_away(aggregator, problem)


@pytest.mark.parametrize("aggregator", TABLE, ids=repr)
def test_samples(aggregator):
    assert_samples_are_independent(aggregator)
    assert_gram_matrices_broadcast(aggregator)
