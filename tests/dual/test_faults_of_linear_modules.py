"""Modules that are registered as linear: further arguments, memory that is shared, lost graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multitangent import ForwardGradient, Normal, VerificationError
from multitangent.dual import DualTensor, WrongTransposeError, register_linear_module

B, D = 4, 5
F64 = torch.float64


@register_linear_module
class Gated(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate + 1


@register_linear_module
class Unchanged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@register_linear_module
class OneBuffer(nn.Module):
    """Every call of one shape returns the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out = self.outputs.setdefault(x.shape, torch.empty_like(x))
        return out.copy_(2 * x)


class Cut(nn.Module):
    """The bias is trained, and PyTorch sees nothing of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(D, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.detach() + self.bias


register_linear_module(Cut)


@pytest.mark.parametrize("gates", [(B, 1), (B, D), (1, 1), (D,)])
@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("count", [B, B - 1])
def test_further_arguments_may_be_of_each_sample(gates, samples, count):
    """K tangents that the samples share are as many rows as there are samples, if K is B."""
    x, gate = torch.randn(B, D, dtype=F64), torch.randn(gates, dtype=F64)
    rows = torch.randn(count, samples, D, dtype=F64)
    y = Gated()(DualTensor(x, rows), gate)
    torch.testing.assert_close(y.primal, x * gate + 1)
    torch.testing.assert_close(y.tangents.expand(count, B, D), (rows * gate).expand(count, B, D))


def test_a_module_that_returns_its_input_returns_the_same_tensor():
    x = DualTensor(torch.randn(B, D, dtype=F64), torch.randn(2, B, D, dtype=F64))
    y = Unchanged()(x)
    before = y.tangents
    x.mul_(3.0)
    torch.testing.assert_close(y.primal, x.primal)
    torch.testing.assert_close(y.tangents, 3 * before)


@pytest.mark.parametrize(("count", "samples"), [(1, B), (3, 1)])
def test_outputs_in_one_place_are_refused(count, samples):
    x = DualTensor(torch.randn(samples, D), torch.randn(count, samples, D))
    with pytest.raises(ValueError, match=r"OneBuffer is registered as linear.*Try `\.clone\(\)`"):
        OneBuffer()(x)


def test_a_trained_bias_does_not_hide_that_the_gradient_of_the_input_is_lost():
    x = torch.randn(B, D, dtype=F64)
    with pytest.raises(NotImplementedError, match="Cut should pass a gradient on to its input"):
        Cut()(x.clone().requires_grad_() * 2)
    Cut()(x).sum().backward()  # nothing before it is trained


def test_a_leaf_that_comes_back_has_its_gradient():
    x = torch.randn(B, D, dtype=F64, requires_grad=True)
    Unchanged()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(B, D, dtype=F64))


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x + 1


class Rectified(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


register_linear_module(Tripled, transposed=lambda module, g: 6 * g)
register_linear_module(Rectified, transposed=lambda module, g: g)


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("kind", [Tripled, Rectified])
def test_another_transpose_is_found_where_no_tangent_crosses_the_module(
    kind: type[nn.Module], perturb: Any
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), kind(), nn.Tanh(), nn.Linear(8, 2))
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(4), perturb=perturb)
    with pytest.raises(VerificationError, match="one matrix A and its transpose"):
        gradient(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))


def test_another_transpose_is_found_in_the_local_step() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Tripled(), nn.Tanh(), nn.Linear(8, 2))
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(4), verify=False)
    with pytest.raises(WrongTransposeError, match=r"Tripled is registered.*Found .* and"):
        gradient(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
