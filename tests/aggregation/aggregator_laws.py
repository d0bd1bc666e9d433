"""What every aggregator obeys, and tangents to try it on."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


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


def assert_never_points_away(aggregator, problem):
    """Property 2, for all aggregators: c . d = g . grad f >= 0."""
    tangents, gradient = problem
    estimate = combine(aggregator, tangents, gradient)
    assert estimate.isfinite().all()
    assert estimate @ gradient >= -1e-9 * estimate.norm() * gradient.norm()


def assert_samples_are_independent(aggregator):
    """With tangents of their own, and with shared ones."""
    generator = torch.Generator().manual_seed(1)
    tangents = torch.randn(5, 4, 7, dtype=torch.float64, generator=generator)  # [B, K, n]
    jvps = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    grams = tangents @ tangents.mT
    together = aggregator(grams, jvps, dimension=7)
    shared = aggregator(grams[0], jvps, dimension=7)
    for sample in range(5):
        alone = aggregator(grams[sample], jvps[:, sample], dimension=7)
        torch.testing.assert_close(together[:, sample], alone)
        torch.testing.assert_close(
            shared[:, sample], aggregator(grams[0], jvps[:, sample], dimension=7)
        )


def assert_gram_matrices_broadcast(aggregator, num_tangents=4, dimension=7):
    """Values [R, B] with Gram matrices [B, K, K] are R times the values [B]."""
    generator = torch.Generator().manual_seed(2)
    tangents = torch.randn(5, num_tangents, dimension, dtype=torch.float64, generator=generator)
    jvps = torch.randn(num_tangents, 3, 5, dtype=torch.float64, generator=generator)
    grams = tangents @ tangents.mT
    together = aggregator(grams, jvps, dimension=dimension)
    for row in range(3):
        alone = aggregator(grams, jvps[:, row], dimension=dimension)
        torch.testing.assert_close(together[:, row], alone)
