"""Laws of the tangent sources, over one table of them."""

from __future__ import annotations

import math

import pytest
import torch

from multitangent import Mean, Normal, Projection, Rademacher, forward_gradient
from multitangent.tangents import (
    Cone,
    Normalized,
    Orthogonal,
    Sphere,
    StandardBasis,
    Stream,
    Tangents,
)

RANDOM = [Normal, Rademacher, Sphere, Orthogonal]


def drawn(source, shapes=((64,),), *, seed=0, step=0, samples=None, dtype=torch.float64):
    """All tangents of a source over some sites: ``[b, K, n]``."""
    tangents = Tangents(source, Stream(seed, step))
    for site, shape in enumerate(shapes):
        tangents.add(str(site), torch.zeros(shape, dtype=dtype), samples=samples)
    blocks = [block.rows().flatten(2) for block in tangents.blocks.values()]
    rows = torch.cat(blocks, 2).transpose(0, 1)
    mixing = source.mixing(tangents.gram(), tangents.dimension)
    return rows if mixing is None else mixing.to(dtype) @ rows


TABLE = [
    Normal(4), Rademacher(4), Sphere(4), Orthogonal(4), StandardBasis(4), Cone(4, 60.0),
    Normalized(Normal(4)), Normalized(Cone(3, 20.0)), Normal(2) + Rademacher(3) + Sphere(1),
]  # fmt: skip


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


@pytest.mark.parametrize("samples", [None, range(3)])
def test_lengths_and_angles(samples):
    shapes = ((30,), (4, 5))
    rows = drawn(Sphere(4), shapes, samples=samples)
    torch.testing.assert_close(
        rows.norm(dim=-1), torch.full(rows.shape[:2], math.sqrt(50)).double()
    )
    rows = drawn(Normalized(Cone(4, 30.0)), shapes, samples=samples)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:2]).double())
    rows = drawn(Orthogonal(6), shapes, samples=samples)
    torch.testing.assert_close(rows @ rows.mT, 50 * torch.eye(6).double().expand(len(rows), 6, 6))
    assert (drawn(Rademacher(4), shapes, samples=samples).abs() == 1).all()


@pytest.mark.parametrize("angle", [1.0, 15.0, 45.0, 90.0])
@pytest.mark.parametrize("samples", [None, range(2)])
def test_all_tangents_of_a_cone_are_at_its_angle_to_the_first(angle, samples):
    rows = drawn(Cone(5, angle), ((40,), (10,)), samples=samples)
    unit = rows / rows.norm(dim=-1, keepdim=True)
    cosines = (unit[:, 1:] @ unit[:, :1].mT).squeeze(-1)
    expected = torch.full_like(cosines, math.cos(math.radians(angle)))
    torch.testing.assert_close(cosines, expected, rtol=1e-9, atol=1e-9)
    normal = drawn(Normal(5), ((40,), (10,)), samples=samples)
    torch.testing.assert_close(rows.norm(dim=-1), normal.norm(dim=-1))  # turned, not stretched


def test_more_orthogonal_tangents_than_dimensions_have_an_exact_mean():
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    _, gradient = forward_gradient(lambda x: (x**2).sum(), x, Orthogonal(8), Mean())
    torch.testing.assert_close(gradient, 2 * x)


def test_standard_basis_counts_the_sites_one_after_another():
    rows = drawn(StandardBasis(4), ((1,), (2,), (3,)))[0]
    torch.testing.assert_close(rows, torch.eye(6, dtype=torch.float64)[:4])
    torch.testing.assert_close(drawn(StandardBasis(3), ((2,),))[0], torch.eye(3).double()[:, :2])


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


@pytest.mark.parametrize("angle", [0.0, 91.0, -3.0])
def test_the_angle_is_checked(angle):
    with pytest.raises(ValueError, match="`angle` should be in degrees"):
        Cone(3, angle)


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
