"""Siblings of known faults: the gradient is that of backpropagation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models_for_tests import OfParts, gradients, relative_error
from multitangent import Activations, ForwardGradient, Normal, Projection, VerificationError
from multitangent.tangents import StandardBasis

DTYPE = torch.float64
SQUARE = nn.MSELoss()
BOTH = pytest.mark.parametrize("perturb", ["activations", "weights"])


def data(*shape, seed=1):
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def two(function):
    torch.manual_seed(0)
    return OfParts(function, nn.Linear(4, 5, dtype=DTYPE), nn.Linear(5, 3, dtype=DTYPE))


X, Y = data(6, 4), data(6, 3, seed=2)


def gradient_of(model, perturb, loss=SQUARE, **options):
    return ForwardGradient(model, loss, StandardBasis(200), Projection(), perturb, **options)


def assert_right(model, perturb, x=X, y=Y, loss=SQUARE, **options):
    value = loss(copy.deepcopy(model)(x), y).mean()
    expected = torch.autograd.grad(loss(model(x), y).mean(), list(model.parameters()))
    found = gradient_of(model, perturb, loss, **options)(x, y)
    torch.testing.assert_close(found, value.detach())
    assert relative_error(gradients(model), list(expected)) <= 1e-9


ORDERS = {
    "reversed": lambda x: x.flip(0),
    "shifted": lambda x: x.roll(1, 0),
    "shifted by two": lambda x: x.roll(2, 0),
    "halves swapped": lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_samples_in_another_order_are_noticed(order):
    def function(parts, x):
        h = ORDERS[order](parts[1](ORDERS[order](parts[0](x)).tanh()))
        return h if order != "shifted" else h.roll(-2, 0)

    with pytest.raises(VerificationError, match="their order may change"):
        gradient_of(two(function), "activations")(X, Y)
    assert_right(two(function), "weights")


@pytest.mark.parametrize("micro_batch", [1, 2, "auto"])
@BOTH
def test_a_batch_of_two_samples_that_meet(perturb, micro_batch):
    def function(parts, x):
        h = parts[0](x).tanh()
        return parts[1](h - 0.5 * h.mean(0))

    model = two(function)
    if perturb == "weights" and micro_batch != 1:
        assert_right(model, perturb, X[:2], Y[:2], micro_batch=micro_batch)
    elif perturb == "activations" and micro_batch != 1:
        with pytest.raises(VerificationError, match="Samples may depend on each other"):
            gradient_of(model, perturb, micro_batch=micro_batch)(X[:2], Y[:2])


@pytest.mark.parametrize("length", [2, 6])
@BOTH
def test_positions_in_a_given_micro_batch_without_verification(perturb, length):
    def function(parts, x):
        return parts[1]((parts[0](x) + parts[2](torch.arange(length))).tanh().mean(1))

    model = two(function)
    model.parts.append(nn.Embedding(length, 5, dtype=DTYPE))
    assert_right(model, perturb, data(6, length, 4), micro_batch=2, verify=False)


def of_the_first(parts, x):
    h = parts[0](x)
    return parts[1](h * h[:1])


def of_large_batches(parts, x):
    h = parts[0](x)
    return parts[1](h + h.mean(0) if len(h) > 4 else h)


def of_halves(parts, x):
    h = parts[0](x)
    return parts[1](h * h.roll(len(h) // 2, 0))


@pytest.mark.filterwarnings("ignore:micro_batch=2 splits what belongs together")
@pytest.mark.parametrize("verify", ["first", False])
@pytest.mark.parametrize("function", [of_the_first, of_large_batches, of_halves])
def test_parts_are_compared_with_the_whole_batch_where_weights_are_perturbed(function, verify):
    assert_right(two(function), "weights", micro_batch=2, verify=verify)


@BOTH
def test_a_reduction_that_changes_between_steps(perturb):
    model, labels = two(lambda parts, x: parts[1](parts[0](x).tanh())), torch.arange(6) % 3
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE))
    gradient = gradient_of(model, perturb, loss)
    gradient(X, labels)
    for reduction in ("sum", "mean"):
        loss.reduction = reduction
        model.zero_grad()
        value = loss(model(X), labels)
        expected = torch.autograd.grad(value, list(model.parameters()))
        torch.testing.assert_close(gradient(X, labels), value.detach())
        assert relative_error(gradients(model), list(expected)) <= 1e-9


@pytest.mark.parametrize("verify", ["first", False])
@BOTH
def test_gamma_samples_in_parts(perturb, verify):
    def function(parts, x):
        h = parts[0](x).tanh()
        return parts[1](torch.distributions.Gamma(h.exp(), torch.ones_like(h)).rsample())

    found = []
    for micro_batch in (6, 2):
        model = two(function)
        gradient_of(model, perturb, micro_batch=micro_batch, verify=verify)(X, Y)
        found.append(gradients(model))
    assert relative_error(*found) <= 1e-9


class Centred(torch.autograd.Function):
    """What all samples share is taken away, and with it the tangents that they share."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


def test_a_function_that_takes_some_tangents_to_zero():
    model = two(lambda parts, x: parts[1](Centred.apply(parts[0](x))))
    assert_right(model, "weights")


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.3 * x

    @staticmethod
    def backward(ctx, gradient):
        return 0.3 * gradient


@BOTH
def test_functions_with_a_backward_in_few_bits(perturb):
    model = two(lambda parts, x: parts[1](Scaled.apply(parts[0](x).tanh()).tanh()))
    ForwardGradient(model.bfloat16(), SQUARE, Normal(16), perturb=perturb)(
        X.bfloat16(), Y.bfloat16()
    )
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:micro_batch=2 splits what belongs together")
def test_a_model_that_differentiates_by_its_input_alone_in_parts():
    def function(parts, x):
        z = x.detach().clone().requires_grad_()
        slope = torch.autograd.grad((z**3).sum(), z)[0]
        return parts[1](parts[0](x + slope).tanh())

    assert_right(two(function), "activations", micro_batch=2)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_module_replaced_between_compiled_steps():
    model = nn.Sequential(*two(None).parts)
    model.insert(1, nn.Tanh())
    gradient = gradient_of(model, "activations", compile=True)
    for activation in (nn.Tanh(), nn.Sigmoid()):
        model[1] = activation
        model.zero_grad()
        expected = torch.autograd.grad(SQUARE(model(X), Y), list(model.parameters()))
        gradient(X, Y)
        assert relative_error(gradients(model), list(expected)) <= 1e-9


@pytest.mark.parametrize("verify", ["first", False])
def test_a_layer_called_with_other_parameters(verify):
    def function(parts, x):
        doubled = {"weight": 2 * parts[1].weight}
        return torch.func.functional_call(parts[1], doubled, (parts[0](x).tanh(),))

    assert_right(two(function), "activations", verify=verify)
    with pytest.raises(ValueError, match="another tensor in the place of 'weight'"):
        gradient_of(two(function), Activations(recompute=True), verify=verify)(X, Y)
