"""The orthogonal projection onto the span of the tangents."""

from __future__ import annotations

import pytest
import torch
from aggregator_laws import (
    assert_gram_matrices_broadcast,
    assert_never_points_away,
    assert_samples_are_independent,
    case,
    combine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from multitangent import ControlVariate, Mean, Projection
from multitangent.aggregation import Rescaled, Sum, TopK

TABLE = [Projection(), Projection(rtol=1e-4)]


@given(case())
@settings(deadline=None)
def test_projection_is_idempotent(problem):
    tangents, gradient = problem
    once = combine(Projection(), tangents, gradient)
    torch.testing.assert_close(combine(Projection(), tangents, once), once, rtol=1e-6, atol=1e-8)


@given(case())
@settings(deadline=None)
def test_projection_equals_that_of_an_orthonormal_basis(problem):
    """The rows of V^T of the singular value decomposition span the same space (Eq. 9)."""
    tangents, gradient = problem
    lengths = tangents.norm(dim=1, keepdim=True)
    _, values, basis = torch.linalg.svd(tangents / lengths.clamp(min=1e-300), full_matrices=False)
    basis = basis[values > 1e-7 * values.max()]
    expected = basis.T @ (basis @ gradient)
    found = combine(Projection(), tangents, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@given(case(kind=st.just("independent"), num_tangents=st.integers(1, 5)), st.integers(0, 99))
@settings(deadline=None)
def test_projection_depends_on_the_span_alone(problem, seed):
    """V -> M V with M = Q D, Q orthogonal and D between 1/2 and 2, so well conditioned."""
    tangents, gradient = problem
    generator = torch.Generator().manual_seed(seed)
    k = len(tangents)
    mixing = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=generator))[0]
    mixing = mixing * (0.5 + 1.5 * torch.rand(k, dtype=torch.float64, generator=generator))
    found = combine(Projection(), mixing @ tangents, gradient)
    torch.testing.assert_close(
        found, combine(Projection(), tangents, gradient), rtol=1e-5, atol=1e-6
    )


@given(case())
@settings(deadline=None)
def test_projection_is_exact_in_the_span(problem):
    tangents, _ = problem
    lengths = tangents.norm(dim=1, keepdim=True).clamp(min=1e-300)
    inside = (tangents / lengths).T @ torch.linspace(-1, 1, len(tangents), dtype=torch.float64)
    found = combine(Projection(), tangents, inside)
    torch.testing.assert_close(found, inside, rtol=1e-6, atol=1e-7)


@given(case())
@settings(deadline=None)
def test_projection_is_at_least_as_close_as_any_other(problem):
    """Lemma 2."""
    tangents, gradient = problem
    best = (combine(Projection(), tangents, gradient) - gradient).norm()
    others = [Sum(), Mean(), TopK(1), Rescaled(Mean()), ControlVariate(0.1), ControlVariate()]
    for aggregator in others:
        distance = (combine(aggregator, tangents, gradient) - gradient).norm()
        assert best <= distance * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
def test_projection_of_near_parallel_tangents_in_float32(angle):
    """Two tangents at a small angle span the plane: a gradient in it comes back."""
    generator = torch.Generator().manual_seed(0)
    first, other, gradient = torch.randn(3, 1000, generator=generator)
    other = other - (other @ first) / (first @ first) * first
    second = first + angle * other
    gradient = first + other
    tangents = torch.stack([first, second])
    gram = tangents.double() @ tangents.double().T
    coefficients = Projection()(gram, tangents @ gradient)
    found = tangents.double().T @ coefficients
    assert (found - gradient).norm() / gradient.norm() < 5e-3


def test_projection_tolerance_is_an_argument():
    tangents = torch.tensor([[1.0, 0.0], [1.0, 1e-3]], dtype=torch.float64)
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(combine(Projection(), tangents, gradient), gradient)
    assert combine(Projection(rtol=1e-3), tangents, gradient).norm() < 1e-3
    with pytest.raises(ValueError, match="`rtol` should be at least 0"):
        Projection(rtol=-1.0)


@pytest.mark.parametrize(("num_tangents", "dimension"), [(5, 4), (40, 3), (64, 63), (9, 1)])
def test_more_tangents_than_dimensions(num_tangents, dimension):
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(3, num_tangents, dimension, dtype=torch.float64, generator=generator)
    tangents[0, 1:] = tangents[0, :1]  # of rank one
    tangents[1, 0] = 0
    grams = tangents @ tangents.mT
    # Nothing that tangents in so few dimensions could measure: noise, to be averaged alike.
    jvps = torch.randn(num_tangents, 3, dtype=torch.float64, generator=generator)
    knowing = Projection()(grams, jvps, dimension=dimension)
    torch.testing.assert_close(knowing, Projection()(grams, jvps), rtol=1e-6, atol=1e-8)


def test_pinned_values():
    gram, jvps = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([7.0, 3.0])
    torch.testing.assert_close(Projection()(gram, jvps), torch.tensor([4.0, -1.0]).double())


def test_more_tangents_than_dimensions_of_many_values():
    assert_gram_matrices_broadcast(Projection(), num_tangents=9, dimension=4)


@given(case())
@settings(deadline=None, max_examples=60)
def test_never_points_away_from_the_gradient(problem):
    for aggregator in TABLE:
        assert_never_points_away(aggregator, problem)


@pytest.mark.parametrize("aggregator", TABLE, ids=repr)
def test_samples(aggregator):
    assert_samples_are_independent(aggregator)
    assert_gram_matrices_broadcast(aggregator)
