"""Modules that are registered as linear: tangents, gradients of inputs, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import Activations, ForwardGradient, Projection, SimulatedGradient
from multitangent.dual import DualTensor, has_rule, register_linear_module
from multitangent.gradient import VerificationError
from multitangent.tangents import LowRank, Normal

B, T, D, N, K = 3, 4, 5, 6, 7


class Int8(nn.Module):
    """A linear layer with weights of int8 and a scale for each row."""

    def __init__(self, inputs: int = D, outputs: int = N, bias: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (outputs, inputs)).to(torch.int8))
        self.register_buffer("scale", torch.rand(outputs) / 127)
        self.register_buffer("bias", bias * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale + self.bias

    def dequantised(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def transposed(self, gradient: Tensor) -> Tensor:
        return gradient @ self.dequantised().to(gradient.dtype)


class Declared(Int8):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Kernel(Int8):
    """The same by something that PyTorch knows no derivative of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(x.detach()).detach().numpy())


class Opaque(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OpaqueWithGradient(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _Own(torch.autograd.Function):
    """A function with a backward of its own, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Int8) -> Tensor:
        ctx.module = module
        return Int8.forward(module, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.module.transposed(gradient), None


class OwnFunction(Int8):
    def forward(self, x: Tensor) -> Tensor:
        return _Own.apply(x, self)


class NotLinear(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NotLinearInPyTorch(Int8):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class RoundsItsInput(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return super().forward((x / unit).round() * unit)


class WrongTransposed(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


for kind in (Declared, Opaque, OwnFunction, NotLinearInPyTorch):
    register_linear_module(kind)
for kind in (OpaqueWithGradient, NotLinear, RoundsItsInput):
    register_linear_module(kind, transposed=Int8.transposed)
register_linear_module(
    WrongTransposed, transposed=lambda module, gradient: 2 * module.transposed(gradient)
)

RIGHT = [Declared, Opaque, OpaqueWithGradient, OwnFunction]
WITH_GRADIENT = [Declared, OpaqueWithGradient, OwnFunction]


def of_kind(kind: Callable[..., nn.Module], **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options).double()


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize(
    ("shape", "of_tangents"),
    [
        ((D,), (D,)),
        ((B, D), (B, D)),
        ((B, D), (1, D)),
        ((B, D), (1, 1)),
        ((B, T, D), (B, T, D)),
        ((B, T, D), (1, T, D)),
        ((B, T, D), (B, 1, D)),
    ],
)
def test_tangents_are_those_of_dequantised_weights(kind, shape, of_tangents):
    module = of_kind(kind)
    x = DualTensor(torch.randn(shape).double(), torch.randn(K, *of_tangents).double())
    found = module(x)
    expected = F.linear(x, module.dequantised(), module.bias)
    torch.testing.assert_close(found.primal, expected.primal, rtol=1e-12, atol=1e-12)
    tangents = [t.expand(K, *found.shape) for t in (found.tangents, expected.tangents)]
    torch.testing.assert_close(*tangents, rtol=1e-12, atol=1e-12)
    if len(shape) > 1 and of_tangents[0] == 1:
        assert found.tangents.shape[1] == 1  # samples still share them


def test_arguments_by_name():
    x = DualTensor(torch.randn(B, D).double(), torch.randn(K, B, D).double())
    module = of_kind(Opaque)
    assert torch.equal(module(x=x).tangents, module(x).tangents)


def test_ordinary_tensors_go_to_the_module_as_ever():
    module = of_kind(Declared)
    x = torch.randn(B, D).double()
    plain = copy.deepcopy(module)
    plain.__class__ = Int8
    assert torch.equal(module(x), plain(x))
    module.scale.requires_grad_()  # somebody else may train it
    assert module(x).requires_grad


def test_no_tangents():
    out = of_kind(Opaque)(DualTensor(torch.ones(B, D).double(), torch.zeros(0, B, D).double()))
    assert not isinstance(out, DualTensor)


def test_a_large_bias_leaves_tangents_as_they_are():
    """In single precision nothing of these tangents would be left beside the bias."""
    module = of_kind(Opaque, bias=1e4).float()
    x = DualTensor(torch.randn(B, D), 1e-4 * torch.randn(K, B, D))
    expected = F.linear(x.tangents, module.dequantised())
    assert relative_error([module(x).tangents], [expected]) < 1e-5


@pytest.mark.parametrize("kind", RIGHT)
def test_tangents_of_half_precision(kind):
    module = of_kind(kind).float()
    x = DualTensor(torch.randn(B, D), torch.randn(K, B, D).bfloat16())
    out = module(x)
    assert out.primal.dtype is torch.float32 and out.tangents.dtype is torch.bfloat16
    expected = F.linear(x.tangents.float(), module.dequantised())
    assert relative_error([out.tangents.float()], [expected]) < 1e-2


def test_a_model_of_half_precision_does_not_overflow():
    module = of_kind(Declared).half()
    x = DualTensor(torch.ones(B, D).half(), 100 * torch.ones(K, B, D).half())
    expected = F.linear(x.tangents.float(), module.dequantised().float())
    assert relative_error([module(x).tangents.float()], [expected]) < 1e-2


@pytest.mark.parametrize("kind", WITH_GRADIENT)
def test_backpropagation(kind):
    module = of_kind(kind)
    x = torch.randn(B, T, D).double().requires_grad_()
    torch.autograd.gradcheck(module, x)


class Model(nn.Module):
    """A frozen layer between trained ones, inside a block and at its end."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList(_Block(kind) for _ in range(2))
        self.last = nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(torch.cat([x, x[..., :1]], -1)).mean(1)


class _Block(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(D, D), nn.Linear(N, D)
        self.frozen, self.end = kind(), kind(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.after(self.frozen(self.before(x).tanh())).tanh())


def taken(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, D).double(), torch.randn(B, 2).double()


def dequantised(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Int8):
            module.__class__ = Int8
    return other


PERTURBED = pytest.mark.parametrize(
    "perturb", ["activations", "weights", Activations(recompute=True)]
)


@PERTURBED
@pytest.mark.parametrize("kind", WITH_GRADIENT)
def test_forward_gradients(kind, perturb):
    """Verified, and equal to those of layers that PyTorch knows, and to backpropagation."""
    model, (x, y) = of_kind(lambda: Model(kind)), batch()
    F.mse_loss(dequantised(model)(x), y).backward()
    F.mse_loss(model(x), y).backward()
    right = taken(model)
    found = []
    for each in (model, dequantised(model)):
        ForwardGradient(each, nn.MSELoss(), Normal(3), perturb=perturb)(x, y)
        found.append(taken(each))
    assert relative_error(*found) < 1e-10
    SimulatedGradient(model, nn.MSELoss(), Normal(3), perturb=perturb)(x, y)
    assert relative_error(taken(model), found[0]) < 1e-10
    full = ForwardGradient(model, nn.MSELoss(), Normal(400), Projection(), perturb=perturb)
    full(x, y)
    assert relative_error(taken(model), right) < 1e-10


@PERTURBED
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_parts_of_the_batch(perturb, micro_batch):
    """Layers of one input, one beside the other, are not taken for one another."""
    model, (x, y) = of_kind(lambda: _Beside(Declared)), batch()
    found = []
    for each in (model, dequantised(model)):
        gradient = ForwardGradient(
            each, nn.MSELoss(), Normal(3), perturb=perturb, micro_batch=micro_batch, verify=False
        )
        gradient(x, y)
        found.append(taken(each))
    assert relative_error(*found) < 1e-10


class _Beside(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.left = nn.Linear(D, N), kind(N, N)
        self.right, self.last = nn.Linear(N, N), nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.left(h) * self.right(h)).mean(1)


def test_tangents_in_factors_and_of_half_precision():
    model, (x, y) = of_kind(lambda: Model(OpaqueWithGradient)), batch()
    found = []
    for each in (model, dequantised(model)):
        gradient = ForwardGradient(
            each, nn.MSELoss(), LowRank(3), perturb="weights", tangent_dtype=torch.bfloat16
        )
        gradient(x, y)
        found.append(taken(each))
    assert relative_error(*found) < 0.05


def test_tangents_stop_where_gradients_are_switched_off():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen = nn.Linear(D, D), OpaqueWithGradient(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            with torch.no_grad():
                constant = self.frozen(h)
            return (h * constant).sum(-1).mean(1, keepdim=True).expand(-1, 2)

    model, (x, y) = of_kind(Constant), batch()
    F.mse_loss(model(x), y).backward()
    right = taken(model)
    ForwardGradient(model, nn.MSELoss(), Normal(40), Projection(), perturb="weights")(x, y)
    assert relative_error(taken(model), right) < 1e-10


@PERTURBED
@pytest.mark.parametrize("kind", [NotLinear, NotLinearInPyTorch, RoundsItsInput, WrongTransposed])
def test_a_wrong_declaration_is_found(kind, perturb):
    model, (x, y) = of_kind(lambda: Model(kind)), batch()
    with pytest.raises(VerificationError):
        ForwardGradient(model, nn.MSELoss(), Normal(3), perturb=perturb)(x, y)


def test_slopes_and_curvatures():
    model, (x, y) = of_kind(lambda: Model(Declared)), batch()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    lines = []
    for each in (model, dequantised(model)):
        gradient = ForwardGradient(each, nn.MSELoss(), Normal(3))
        gradient(x, y)
        lines.append(gradient.along(direction))
    torch.testing.assert_close(lines[0].slopes, lines[1].slopes)
    torch.testing.assert_close(lines[0].curvatures, lines[1].curvatures)


def test_without_a_derivative_weights_are_trained_and_activations_are_not():
    model, (x, y) = of_kind(lambda: Model(Opaque)), batch()
    expected = []
    for each in (model, dequantised(model)):
        gradient = ForwardGradient(each, nn.MSELoss(), Normal(3), perturb="weights", verify=False)
        gradient(x, y)
        expected.append(taken(each))
    assert relative_error(*expected) < 1e-10
    with pytest.warns(UserWarning, match="could not compare.*Opaque should pass a gradient"):
        ForwardGradient(model, nn.MSELoss(), Normal(3), perturb="weights")(x, y)
    with pytest.raises(NotImplementedError, match=r"Opaque should pass.*transposed="):
        ForwardGradient(model, nn.MSELoss(), Normal(3))(x, y)


@PERTURBED
def test_what_is_trained_inside_is_refused(perturb):
    model, (x, y) = of_kind(lambda: Model(Declared)), batch()
    frozen = model.blocks[1].frozen
    bias = frozen.bias
    del frozen.bias
    frozen.bias = nn.Parameter(bias)
    with pytest.raises(ValueError, match=r"nothing inside of it should be trained\. Found 'bias'"):
        ForwardGradient(model, nn.MSELoss(), Normal(3), perturb=perturb)(x, y)


def test_backpropagation_does_not_lose_what_is_trained_inside():
    x = torch.ones(B, D, requires_grad=True)
    module = of_kind(Declared).float()
    module.scale.requires_grad_()
    module(x).sum().backward()
    assert module.scale.grad is not None
    other = of_kind(OpaqueWithGradient).float()
    other.scale.requires_grad_()
    with pytest.raises(ValueError, match=r"trained.*Found 'scale'"):
        other(x)


def test_other_arguments_are_constant():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor

    register_linear_module(Scaled, transposed=lambda module, gradient: gradient)
    x = DualTensor(torch.ones(B, D), torch.ones(K, B, D))
    assert torch.equal(Scaled()(x, torch.tensor(2.0)).tangents, 2 * x.tangents)
    with pytest.raises(ValueError, match="Scaled is registered as linear in its first argument"):
        Scaled()(x, x)
    with pytest.raises(ValueError, match="the others should be constant"):
        Scaled()(x.primal.requires_grad_(), factor=torch.ones(1, requires_grad=True))


@pytest.mark.parametrize(
    ("function", "found"),
    [(lambda x: (x, x), "tuple"), (lambda x: x.sum(0), r"\[5\]"), (lambda x: x[:1], r"\[1, 5\]")],
)
def test_outputs_that_are_not_of_samples_are_refused(function, found):
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    register_linear_module(Other)
    with pytest.raises(ValueError, match=rf"one tensor whose first axis.*Found {found}"):
        Other()(DualTensor(torch.ones(B, D), torch.ones(K, B, D)))


def test_a_transposed_product_of_another_shape_is_refused():
    class Other(Kernel):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    register_linear_module(Other, transposed=lambda module, gradient: gradient)
    with pytest.raises(ValueError, match=r"`transposed` of .*Other.*\[3, 5\]. Found \[3, 6\]"):
        Other()(torch.ones(B, D, requires_grad=True)).sum().backward()


def test_registration():
    assert has_rule(Opaque.forward)
    with pytest.raises(ValueError, match=r"registered once.*Found Opaque a second time"):
        register_linear_module(Opaque)
    with pytest.raises(TypeError, match="`kind` should be a class of modules"):
        register_linear_module(Opaque())
