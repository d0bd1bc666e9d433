"""A gradient at its expected length."""

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

from multitangent import Mean, Projection
from multitangent.aggregation import Rescaled, Sum, TopK

TABLE = [Rescaled(Mean()), Rescaled(Projection())]


@pytest.mark.parametrize("inner", [Sum(), Mean(), Projection()], ids=repr)
@pytest.mark.parametrize(("num_tangents", "dimension"), [(1, 20), (4, 20), (16, 20)])
def test_rescaled_has_the_gradients_expected_length(inner, num_tangents, dimension):
    gradient = torch.ones(dimension, dtype=torch.float64)
    tangents = torch.randn(
        4000, num_tangents, dimension, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    coefficients = Rescaled(inner)(
        tangents @ tangents.mT, (tangents @ gradient).T, dimension=dimension
    )
    estimates = torch.einsum("kb,bkn->bn", coefficients, tangents)
    ratio = estimates.square().sum(1).mean() / dimension
    assert abs(ratio - 1) < 0.1


def test_rescaled_needs_a_closed_form_and_the_dimension():
    gram, jvps = torch.eye(2), torch.ones(2)
    with pytest.raises(NotImplementedError, match=r"Found TopK\(num_kept=1\)"):
        Rescaled(TopK(1))(gram, jvps, dimension=4)
    with pytest.raises(ValueError, match="`dimension` should be given"):
        Rescaled(Mean())(gram, jvps)


@given(case())
@settings(deadline=None, max_examples=60)
def test_never_points_away_from_the_gradient(problem):
    for aggregator in TABLE:
        assert_never_points_away(aggregator, problem)


@pytest.mark.parametrize("aggregator", TABLE, ids=repr)
def test_samples(aggregator):
    assert_samples_are_independent(aggregator)
    assert_gram_matrices_broadcast(aggregator)
