"""Laws of the aggregators, over one table of them and of tangents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multitangent import ControlVariate, Mean, Projection
from multitangent.aggregation import Rescaled, Sum, TopK

AGGREGATORS = [
    Sum(), Mean(), Projection(), TopK(1), TopK(3), Rescaled(Mean()), Rescaled(Projection()),
    ControlVariate(0.1), ControlVariate(),
]  # fmt: skip
OF_ONE_SAMPLE = AGGREGATORS[:-1]  # the last sets its gain by how many samples there are


def draw(num_tangents, dimension, seed, kind="independent"):
    """Tangents ``[K, n]`` with a property, and a gradient ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    tangents = torch.randn(num_tangents, dimension, dtype=torch.float64, generator=generator)
    if kind == "duplicated":
        tangents[-1] = tangents[0]
    elif kind == "dependent":
        tangents[-1] = tangents[:-1].sum(0) if num_tangents > 1 else 0
    elif kind == "zero":
        tangents[-1] = 0
    elif kind == "long":
        tangents[0] *= 1e6
    return tangents, torch.randn(dimension, dtype=torch.float64, generator=generator)


def combine(aggregator, tangents, gradient):
    coefficients = aggregator(tangents @ tangents.T, tangents @ gradient, dimension=len(gradient))
    return tangents.T @ coefficients


def case(**changes):
    table = {
        "num_tangents": st.integers(1, 12),
        "dimension": st.integers(1, 9),
        "seed": st.integers(0, 1000),
        "kind": st.sampled_from(["independent", "duplicated", "dependent", "zero", "long"]),
    }
    return st.builds(draw, **(table | changes))


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
@given(case())
@settings(deadline=None, max_examples=60)
def test_never_points_away_from_the_gradient(aggregator, problem):
    """Property 2, for all aggregators: c . d = g . grad f >= 0."""
    tangents, gradient = problem
    estimate = combine(aggregator, tangents, gradient)
    assert estimate.isfinite().all()
    assert estimate @ gradient >= -1e-9 * estimate.norm() * gradient.norm()


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
    for aggregator in AGGREGATORS:
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


def test_pinned_values():
    gram = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    jvps = torch.tensor([7.0, 3.0])
    for aggregator, expected in [
        (Sum(), [7.0, 3.0]),
        (Mean(), [3.5, 1.5]),
        (Projection(), [4.0, -1.0]),
        (TopK(1), [7.0, 0.0]),
    ]:
        torch.testing.assert_close(aggregator(gram, jvps), torch.tensor(expected).double())


@pytest.mark.parametrize("aggregator", OF_ONE_SAMPLE, ids=repr)
def test_samples_are_independent(aggregator):
    generator = torch.Generator().manual_seed(1)
    tangents = torch.randn(5, 4, 7, dtype=torch.float64, generator=generator)  # [B, K, n]
    jvps = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    grams = tangents @ tangents.mT
    whole = aggregator(grams, jvps, dimension=7)
    shared = aggregator(grams[0], jvps, dimension=7)
    for sample in range(5):
        alone = aggregator(grams[sample], jvps[:, sample], dimension=7)
        torch.testing.assert_close(whole[:, sample], alone)
        torch.testing.assert_close(
            shared[:, sample], aggregator(grams[0], jvps[:, sample], dimension=7)
        )


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


@pytest.mark.parametrize(
    ("gram", "jvps", "message"),
    [
        (torch.eye(3), torch.ones(2), "of the same tangents and samples"),
        (torch.ones(4, 2, 2), torch.ones(2, 3), "of the same tangents and samples"),
        (torch.eye(2), torch.ones(()), "of the same tangents and samples"),
        (torch.eye(2), torch.tensor([1.0, float("nan")]), "`jvps` should be finite. Found 1 of 2"),
        (torch.eye(2) / 0, torch.ones(2), "`gram` should be finite"),
    ],
)
def test_what_does_not_fit_is_an_error(gram, jvps, message):
    with pytest.raises(ValueError, match=message):
        Projection()(gram, jvps)


@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_best_keeps_at_least_one(number):
    with pytest.raises(ValueError, match="`num_kept` should be an integer"):
        TopK(number)


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


def test_as_many_words_on_guesses_as_tangents():
    message = "`guesses` should say of each of the 2 tangents .* Found 3 values"
    with pytest.raises(ValueError, match=message):
        ControlVariate()(torch.eye(2), torch.ones(2), guesses=[True, False, False])


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
