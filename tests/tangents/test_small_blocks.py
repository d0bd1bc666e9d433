"""Small blocks are combined by one product."""

from __future__ import annotations

import pytest
import torch

from multitangent.tangents import Normal, Stream, Tangents

SHAPES = [(3,), (2, 4), ()]


def tangents(**options):
    result = Tangents(Normal(5), Stream(0, 0), **options)
    for site, shape in enumerate(SHAPES):
        result.add(str(site), torch.zeros(7, *shape, dtype=torch.float64), shape)
    return result


@pytest.mark.parametrize("losses", [(), (7,), (2, 7)])
def test_small_blocks_are_combined_as_each_is_by_itself(losses):
    coefficients = torch.randn(5, *losses, dtype=torch.float64)
    expected = tangents().combine(coefficients)  # before there is a Gram matrix
    together = tangents()
    together.gram()
    found = together.combine(coefficients)
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("options", [{"store": False}, {"dtype": torch.float32}], ids=str)
def test_blocks_that_are_not_kept_or_of_another_type_are_combined_too(options):
    expected = tangents(**options).combine(torch.ones(5))
    together = tangents(**options)
    together.gram()
    for name, gradient in together.combine(torch.ones(5)).items():
        assert gradient.dtype is torch.float64
        torch.testing.assert_close(gradient, expected[name])


def test_a_large_block_beside_small_ones():
    together, apart = tangents(), tangents()
    for each in (together, apart):
        each.add("large", torch.zeros(7, 2**14, dtype=torch.float64), (2**14,))
    together.gram()
    found, expected = together.combine(torch.ones(5)), apart.combine(torch.ones(5))
    torch.testing.assert_close(found, expected)
