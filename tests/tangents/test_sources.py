"""Laws of the tangent sources, over one table of them."""

from __future__ import annotations

import pytest
import torch
from source_laws import RANDOM, TABLE, drawn

from multitangent import Mean, Normal, Projection, Rademacher, forward_gradient
from multitangent.tangents import (
    Sphere,
    StandardBasis,
    Stream,
    Tangents,
)


@pytest.mark.parametrize("source", TABLE, ids=repr)
def test_blocks_are_a_function_of_seed_step_and_site(source):
    shapes = ((5,), (2, 3))
    assert torch.equal(drawn(source, shapes), drawn(source, shapes))
    assert drawn(source, shapes).shape == (1, source.num_tangents, 11)
    own = drawn(source, shapes, samples=range(3))
    alone = drawn(source, shapes, samples=range(1, 2)).expand_as(own[1:2])
    torch.testing.assert_close(own[1:2], alone, rtol=1e-12, atol=1e-12)
    if source != StandardBasis(4):
        for other in ({"seed": 1}, {"step": 1}):
            assert not torch.equal(drawn(source, shapes), drawn(source, shapes, **other))
        assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("kind", RANDOM)
def test_a_row_does_not_depend_on_how_many_there_are(kind):
    if kind in (Sphere, Normal, Rademacher):
        torch.testing.assert_close(drawn(kind(2)), drawn(kind(5))[:, :2])
    before = drawn(Normal(3) + kind(2))[:, 3:]
    assert not torch.equal(before, drawn(kind(2)))  # sources added up are independent


@pytest.mark.parametrize("kind", RANDOM)
def test_entries_have_mean_zero_and_covariance_one(kind):
    """20 000 tangents of two sites; the standard error of each entry below is 0.007 to 0.01."""
    rows = torch.cat([drawn(kind(4), ((3,), (2, 2)), step=step)[0] for step in range(5000)])
    assert rows.mean(0).abs().max() < 0.04
    assert (rows.T @ rows / len(rows) - torch.eye(7)).abs().max() < 0.06


@pytest.mark.parametrize("kind", RANDOM)
def test_the_mean_is_unbiased(kind):
    """Property 1. The standard error of the mean over 3000 steps is about 3 % of the gradient."""
    x = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    found = torch.stack(
        [
            forward_gradient(lambda x: (x**2).sum(), x, kind(2), Mean(), step=step)[1]
            for step in range(3000)
        ]
    )
    assert (found.mean(0) - 2 * x).norm() / (2 * x).norm() < 0.1


@pytest.mark.parametrize("scale", ["one", "float32"])
def test_projection_takes_any_source(scale):
    dtype = torch.float64 if scale == "one" else torch.float32
    x = torch.linspace(-1, 1, 6, dtype=dtype)
    for source in TABLE:
        _, gradient = forward_gradient(lambda x: (x**3).sum(), x, source + Normal(12), Projection())
        torch.testing.assert_close(gradient, 3 * x**2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [*RANDOM, StandardBasis])
@pytest.mark.parametrize("number", [0, -2, 1.5, "3"])
def test_the_number_of_tangents_is_checked(kind, number):
    with pytest.raises(ValueError, match="`num_tangents` should be an integer of at least 1"):
        kind(number)


def test_only_sources_add_up():
    with pytest.raises(TypeError, match="unsupported operand"):
        Normal(3) + 4


@pytest.mark.parametrize("source", TABLE, ids=repr)
@pytest.mark.parametrize("samples", [None, range(20)])
def test_blocks_that_are_drawn_again_are_those_that_were_stored(source, samples):
    both = []
    for store in (True, False):
        tangents = Tangents(source, Stream(3, 1), store=store)
        value = torch.zeros(2, 3, dtype=torch.float64)
        tangents.add("site", value, samples=samples, target=torch.ones(3))
        some = tangents.blocks["site"].rows(slice(2, 5))
        coefficients = torch.arange(20.0 * source.num_tangents).view(-1, 20)
        both.append([some, tangents.gram(), tangents.combine(coefficients)["site"]])
    for stored, again in zip(*both, strict=True):
        torch.testing.assert_close(stored, again, rtol=1e-14, atol=1e-14)
