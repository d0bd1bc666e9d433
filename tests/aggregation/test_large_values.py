"""Finite values whose sum is not, and values that are not finite."""

from __future__ import annotations

import pytest
import torch

from multitangent import Mean, Projection
from multitangent.aggregation import Sum

INF, NAN = float("inf"), float("nan")


def test_finite_values_whose_sum_is_too_large_are_accepted():
    jvps = torch.tensor([1.5e308, 1.5e308], dtype=torch.float64)
    assert Sum()(torch.eye(2).double(), jvps).equal(jvps)


@pytest.mark.parametrize("bad", [[INF, 1.0], [-INF, INF], [NAN, 0.0]])
@pytest.mark.parametrize("aggregator", [Sum(), Mean(), Projection()], ids=repr)
def test_values_that_are_not_finite_are_refused(bad, aggregator):
    with pytest.raises(ValueError, match="`jvps` should be finite"):
        aggregator(torch.eye(2), torch.tensor(bad))
    gram = torch.diag(torch.tensor(bad))
    with pytest.raises(ValueError, match="`gram` should be finite"):
        aggregator(gram, torch.ones(2))
