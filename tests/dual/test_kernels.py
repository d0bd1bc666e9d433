"""The kernels that stand in for PyTorch's: the same values, derivatives and transformations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from multitangent import ForwardGradient, Normal, SimulatedGradient
from multitangent.dual import _kernels
from multitangent.dual._kernels import linear, recorded_linear


@pytest.fixture(autouse=True)
def _for_any_size(monkeypatch):
    monkeypatch.setattr(_kernels, "_SMALL", 1)


SHAPES = [((5, 3), 2), ((2, 4, 3), 7), ((3,), 2), ((0, 3), 2)]


def arguments(shape, outputs):
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(outputs, 3), torch.randn(outputs)


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
@pytest.mark.parametrize("function", [linear, recorded_linear])
def test_values(shape, outputs, function):
    x, weight, bias = arguments(shape, outputs)
    torch.testing.assert_close(function(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(function(x, weight), F.linear(x, weight))
    strided = torch.randn(*shape[:-1], 6)[..., ::2]
    torch.testing.assert_close(function(strided, weight), F.linear(strided, weight))


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_gradients(shape, outputs):
    found, expected = (
        [v.detach().clone().requires_grad_() for v in arguments(shape, outputs)] for _ in range(2)
    )
    (recorded_linear(*found) ** 2).sum().backward()
    (F.linear(*expected) ** 2).sum().backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_transformations_are_not_lost():
    x, weight, bias = arguments((5, 3), 2)
    direction = torch.randn(5, 3)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        along = forward_ad.unpack_dual(recorded_linear(dual, weight, bias)).tangent
    torch.testing.assert_close(along, direction @ weight.T)
    with torch.no_grad():
        along = torch.func.jvp(lambda x: recorded_linear(x, weight, bias), (x,), (direction,))[1]
        torch.testing.assert_close(along, direction @ weight.T)
        rows = torch.func.vmap(lambda x: recorded_linear(x, weight, bias))(x)
        torch.testing.assert_close(rows, F.linear(x, weight, bias))


def test_autocast_keeps_its_type():
    x, weight, bias = arguments((5, 3), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert recorded_linear(x, weight, bias).dtype == torch.bfloat16


def test_a_step_with_them():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    found = []
    for kind in (ForwardGradient, SimulatedGradient):
        kind(model, torch.nn.CrossEntropyLoss(), Normal(3))(x, y)
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
