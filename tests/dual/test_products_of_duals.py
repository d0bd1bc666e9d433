"""Products of two dual tensors whose tangents are not computed yet."""

from __future__ import annotations

import pytest
import torch

from multitangent.dual import DualTensor


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.045 * torch.pow(x, 3.0))))


def swish(x):
    return torch.sigmoid(x) * x


def of_different_shapes(x):
    return x.tanh() * x.sum(0)


@pytest.mark.parametrize("function", [gelu, swish, of_different_shapes])
def test_products_have_the_right_tangents(function):
    x, t = random(3, 4), random(2, 3, 4, seed=1)
    expected = torch.stack([torch.func.jvp(function, (x,), (row,))[1] for row in t])
    torch.testing.assert_close(function(DualTensor(x, t)).tangents, expected)


def test_a_product_of_one_value_with_itself_waits():
    assert gelu(DualTensor(random(3, 4), random(2, 3, 4, seed=1))).is_pending


def test_factors_may_be_written_into_before_the_product_is_computed():
    x, t = random(3, 4), random(2, 3, 4, seed=1)
    y, dual = DualTensor(x.clone(), 2 * t), DualTensor(x.clone(), t)
    sine = dual.sin()
    product = sine * y
    for written in (dual, sine, y):
        written.mul_(3)
    expected = t * (x.cos() * x + 2 * x.sin())
    torch.testing.assert_close(product.tangents, expected)


def test_factors_are_rounded_to_the_type_of_the_tangents():
    x = DualTensor(random(3, 4).float(), random(2, 3, 4, seed=1).bfloat16())
    found = gelu(x).tangents
    full = gelu(DualTensor(x.primal, x.tangents.float())).tangents
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), full, rtol=0.03, atol=0.03)
