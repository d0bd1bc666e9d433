"""Tangents with given lengths or angles."""

from __future__ import annotations

import math

import pytest
import torch
from source_laws import drawn

from multitangent import Mean, Normal, Rademacher, forward_gradient
from multitangent.tangents import (
    Cone,
    Normalized,
    Orthogonal,
    Sphere,
)


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


@pytest.mark.parametrize("angle", [0.0, 91.0, -3.0])
def test_the_angle_is_checked(angle):
    with pytest.raises(ValueError, match="`angle` should be in degrees"):
        Cone(3, angle)
