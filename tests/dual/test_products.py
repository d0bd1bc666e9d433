"""Derivatives that are multiplied later, and what may happen in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multitangent.dual import Drawn, DualTensor, add_to, times
from multitangent.dual._product import Product


def dual(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 5, generator=generator, dtype=torch.float64).to(dtype) + 0.5
    return DualTensor(x, torch.randn(3, 1, 5, generator=generator, dtype=torch.float64).to(dtype))


def test_chains_are_multiplied_once():
    x = dual()
    y = torch.tanh(torch.exp(x)).log()
    ((t, factor),) = y.product.terms
    assert t is x.tangents
    inner, middle = x.primal.exp(), x.primal.exp().tanh()
    slope = inner * (1 - middle**2) / middle
    torch.testing.assert_close(factor, slope)
    torch.testing.assert_close(y.tangents, x.tangents * slope)
    assert y.product.terms == ((y.tangents, None),)


@pytest.mark.parametrize("rows", [3, 2, 5])
def test_a_sum_takes_a_product_along(rows):
    x, t = torch.tanh(dual()), torch.randn(rows, 4, 5, dtype=torch.float64)
    expected = torch.zeros(max(rows, 3), 4, 5, dtype=torch.float64)
    expected[:3] += times(dual(), 1 - x.primal**2).computed()
    expected[:rows] += t
    torch.testing.assert_close(add_to(x, t), expected)
    torch.testing.assert_close((x + DualTensor(x.primal, t)).tangents, expected)
    torch.testing.assert_close((DualTensor(x.primal, t) + x).tangents, expected)


SUMS = {
    "two functions of one value": (lambda x: x.exp() - 3 * x.square(), 1),
    "shifted": (lambda x: (x[:, 1:] - x[:, :-1].square()).square(), 2),
    "and its tangents": (lambda x: 1 - x.sin() + x, 1),
    "rows": (lambda x: x.exp() + DualTensor(x.primal, torch.ones(5, 4, 5).double()).exp(), 1),
    "many": (lambda x: sum(DualTensor(x.primal, x.tangents + i).exp() for i in range(9)), 1),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dim", [None, 0, -1, (0, 1)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_wait_and_become_matrix_products(name, dim, keepdim):
    function, terms = SUMS[name]
    pending = function(dual())
    if name not in ("rows", "many"):
        assert pending.is_pending and len(pending.product.terms) == terms
    found = pending.sum(dim, keepdim)
    x = dual()
    rows = 5 if name == "rows" else 3
    expected = function(DualTensor(x.primal, x.tangents.expand(3, 4, 5).clone()))
    assert expected.tangents.shape == (rows, *expected.primal.shape)  # and so computed
    assert not expected.is_pending
    expected = expected.sum(dim, keepdim)
    torch.testing.assert_close(found.primal, expected.primal)
    torch.testing.assert_close(found.tangents.expand_as(expected.tangents), expected.tangents)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y, other: other.zero_(),
        lambda x, y, other: y.detach().zero_(),
        lambda x, y, other: x.add_(100),
    ],
)
@pytest.mark.parametrize(
    "function",
    [lambda x, other: x * other, lambda x, other: x * x.detach(), lambda x, other: x.exp()],
)
def test_writes_come_too_late(write, function):
    x, other = dual(), torch.rand(4, 5, dtype=torch.float64)
    expected = function(dual(), other.clone()).tangents
    y = function(x, other)
    write(x, y, other)
    torch.testing.assert_close(y.tangents, expected)


def test_a_write_in_place_computes_first():
    x = dual()
    expected = 2 * x.primal * x.tangents
    before = x.primal.clone()
    y = x.clone()
    y.mul_(y.detach())
    torch.testing.assert_close(y.primal, before**2)
    torch.testing.assert_close(y.tangents, expected / 2)


def test_tangents_follow_the_type_of_the_result():
    x = dual(torch.float16)
    for y in (x * torch.ones(4, 5), torch.tanh(x.float()), nn.BatchNorm1d(5).double()(x.double())):
        assert y.tangents.dtype == y.primal.dtype
    mixed = DualTensor(dual(torch.float32).primal, dual(torch.bfloat16).tangents)
    for y in (mixed * 2, torch.tanh(mixed), mixed @ torch.ones(5, 2), mixed.softmax(-1)):
        assert (y.primal.dtype, y.tangents.dtype) == (torch.float32, torch.bfloat16)
    drawn = DualTensor.deferred(mixed.primal, Drawn(lambda: mixed.tangents, torch.bfloat16))
    assert (drawn * 2).tangents.dtype == torch.bfloat16


def test_a_product_is_of_the_tangents_type():
    t, factor = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((3,), 0.5)
    assert Product(t, factor).computed().dtype == torch.bfloat16


def test_fewer_rows_written_into_a_view_leave_zeros():
    x = DualTensor(torch.zeros(2, 3), torch.ones(4, 2, 3))
    x[0].copy_(DualTensor(torch.ones(3), torch.full((1, 3), 5.0)))
    assert torch.equal(x.tangents[:, 0, 0], torch.tensor([5.0, 0.0, 0.0, 0.0]))
    x[1].zero_()
    assert (x.tangents[:, 1] == 0).all()
    assert torch.equal(x.primal, torch.tensor([[1.0] * 3, [0.0] * 3]))
