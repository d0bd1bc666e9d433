"""Guesses, and an estimate of what they miss."""

from __future__ import annotations

import pytest
import torch
from aggregator_laws import (
    assert_gram_matrices_broadcast,
    assert_never_points_away,
    assert_samples_are_independent,
    case,
    draw,
)
from hypothesis import given, settings

from multitangent import ControlVariate

TABLE = [ControlVariate(0.1), ControlVariate(1.0)]


def guided(tangents, gradient, guesses, gain):
    """The estimate of `ControlVariate` with the first tangents for guesses."""
    which = [k < guesses for k in range(len(tangents))]
    gram, jvps = tangents @ tangents.T, tangents @ gradient
    return tangents.T @ ControlVariate(gain)(gram, jvps, guesses=which)


@pytest.mark.parametrize("guesses", [0, 1, 3])
def test_a_control_variate_is_the_projection_on_guesses_and_the_mean_on_the_rest(guesses):
    tangents, gradient = draw(7, 20, seed=1, kind="independent")
    known = tangents[:guesses].T
    projected = known @ torch.linalg.pinv(known) @ gradient
    random = tangents[guesses:]
    outside = random - random @ known @ torch.linalg.pinv(known)
    mean = outside.T @ (random @ (gradient - projected)) / len(random)
    found = guided(tangents, gradient, guesses, 0.3)
    torch.testing.assert_close(found, projected + 0.3 * mean)
    alone = guided(tangents[:guesses], gradient, guesses, 0.3) if guesses else 0 * gradient
    torch.testing.assert_close(alone, projected)


@pytest.mark.parametrize("shape", [[1.0] * 30, [1.0] * 5 + [0.1] * 25], ids=["even", "uneven"])
def test_the_gain_that_sets_itself_counts_the_dimensions_that_matter(shape):
    """1 / (1 + (tr S)^2 / tr S^2 / (0.1 K B)), with S the covariance of the random tangents."""
    count, samples = 3, 4000
    deviations = torch.tensor(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tangents = deviations * torch.randn(
        samples, count, len(shape), dtype=torch.float64, generator=generator
    )
    gram, jvps = tangents @ tangents.mT, tangents.sum(2).T
    variances = deviations.square()
    dimension = variances.sum() ** 2 / variances.square().sum()
    expected = 1 / (1 + dimension / (0.1 * count * samples))
    found = ControlVariate()(gram, jvps, dimension=30) * count / jvps
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0.02, atol=0)
    # Shared by all samples: the error is that of one, with a batch axis or without.
    own = gram[:1].expand(5, -1, -1)
    for one in (own, own[0]):
        found = ControlVariate()(one, jvps[:, :5], dimension=30)
        pairs = (own[0].square().sum() - own[0].diagonal().square().sum()) / (count * (count - 1))
        dimension = (own[0].diagonal().mean() ** 2 / pairs).clamp(max=30)
        gain = 1 / (1 + dimension / count)
        torch.testing.assert_close(found, gain / count * jvps[:, :5])


def test_a_gain_that_sets_itself_needs_two_tangents_or_the_dimension():
    gram, jvps = torch.eye(2), torch.ones(2)
    found = ControlVariate()(gram, jvps, dimension=4, guesses=[True, False])
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / (1 + 4)]).double())
    message = "`dimension` should be given for gain='auto' and a single random tangent"
    for guesses in ([True, False], None):  # the two are orthogonal
        with pytest.raises(ValueError, match=message):
            ControlVariate()(gram, jvps, guesses=guesses)


def test_orthogonal_and_zero_tangents_do_not_upset_the_gain():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 6, 6, dtype=torch.float64, generator=generator))[0]
    for tangents in (6**0.5 * basis[:, :3], 0 * basis[:, :3]):
        found = ControlVariate()(tangents @ tangents.mT, torch.ones(3, 50), dimension=6)
        shared = not tangents.any()
        gain = 1 / (1 + 6 / 3) if shared else 1 / (1 + 6 / (3 * 50 * 0.1))
        torch.testing.assert_close(found, torch.full_like(found, gain / 3))


def test_a_control_variate_is_unbiased_with_the_variance_of_what_the_guess_misses():
    """20 000 estimates: E |g - grad f|^2 = (n - 1 + 1)/K |grad f - p|^2 for a gain of 1."""
    n, count = 6, 2
    _, gradient = draw(1, n, seed=2)
    guess = gradient + 0.3 * draw(1, n, seed=3)[1]
    missed = gradient - guess * (guess @ gradient) / guess.square().sum()
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(20_000, count, n, dtype=torch.float64, generator=generator)
    tangents = torch.cat([guess.expand(20_000, 1, n), random], 1)
    gram, jvps = tangents @ tangents.mT, (tangents @ gradient).T
    c = ControlVariate(1.0)(gram, jvps, guesses=[True, False, False])
    found = torch.einsum("kb,bkn->bn", c, tangents)
    variance = n / count * missed.square().sum()
    assert (found.mean(0) - gradient).norm() < 4 * (variance / 20_000).sqrt()
    torch.testing.assert_close(
        (found - gradient).square().sum(1).mean(), variance, rtol=0.05, atol=0
    )


@given(case())
@settings(deadline=None, max_examples=60)
def test_a_gain_that_sets_itself_never_points_away(problem):
    assert_never_points_away(ControlVariate(), problem)


@given(case())
@settings(deadline=None, max_examples=60)
def test_never_points_away_from_the_gradient(problem):
    for aggregator in TABLE:
        assert_never_points_away(aggregator, problem)


@pytest.mark.parametrize("aggregator", TABLE, ids=repr)
def test_samples(aggregator):
    assert_samples_are_independent(aggregator)
    assert_gram_matrices_broadcast(aggregator)
