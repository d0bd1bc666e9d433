"""Guesses whose part along the value is that of a network without biases."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from guess_laws import gradient_blocks
from torch import nn

from models_for_tests import relative_error
from multitangent import Activations, Feedback, ForwardGradient, LocalLoss, Normal, Weights
from multitangent.aggregation import SumOfGuesses
from multitangent.gradient import DifferenceGradient
from multitangent.tangents import Every, Homogeneous, Normalized, Residual

LOSS = nn.CrossEntropyLoss()
OWN = Activations(share="sample", output="exact")
SOURCES = {
    "one": Normal(2) + Homogeneous(Feedback()),
    "several": Normal(2) + Homogeneous(Feedback(2)),
    "more than sites": Normal(2) + Homogeneous(Feedback(5)),
    "two sources": Normal(2) + Homogeneous(Feedback() + LocalLoss()),
    "every": Every(3, Normal(2) + Homogeneous(Feedback(2))),
    "nothing but this": Homogeneous(Residual()),
}


def linear_model(bias=False):
    sizes = (6, 9, 8, 7, 4)
    layers = [nn.Linear(m, n, bias) for m, n in pairwise(sizes)]
    hidden = [part for layer in layers[:-1] for part in (layer, nn.ReLU())]
    return nn.Sequential(*hidden, layers[-1])


def convolutional_model(bias=False):
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 2, bias=bias),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4, bias=bias),
    )


MODELS = {"linear": (linear_model, (6,)), "convolutional": (convolutional_model, (2, 8, 8))}


def case(name, bias=False, seed=0):
    make, shape = MODELS[name]
    torch.manual_seed(seed)
    model = make(bias).double()
    return model, torch.randn(5, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3])


def along_weights(model):
    """The derivative of the loss by the scale of every layer's weight."""
    weights = [layer.weight for layer in model if hasattr(layer, "weight")]
    return torch.stack([(weight.grad * weight).sum() for weight in weights])


def assert_exact_along_weights(gradient, x, y, **tolerance):
    model = gradient.model
    model.zero_grad()
    gradient(x, y)
    found = along_weights(model)
    model.zero_grad()
    gradient.loss(model(x), y).backward()
    torch.testing.assert_close(found, along_weights(model), **tolerance)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", MODELS)
def test_without_biases_the_derivative_by_the_scale_of_every_weight_is_exact(name, source):
    model, x, y = case(name)
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), OWN)
    for _ in range(4):
        gradient(x, y)
    assert_exact_along_weights(gradient, x, y)
    gradient.step = 13  # `Every` does not learn
    assert_exact_along_weights(gradient, x, y)


def test_every_sample_has_the_derivative_of_its_own_output_along_its_value():
    model, x, y = case("linear", bias=True)
    source = Normal(2) + Homogeneous(Feedback(2))
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), OWN)
    for _ in range(3):
        gradient(x, y)
    output = model(x).detach().requires_grad_()
    F.cross_entropy(output, y, reduction="sum").backward()
    expected = (output * output.grad).sum(1).detach()
    for block in gradient_blocks(gradient, x, y):
        guess = block.rows()[2:].sum(0)
        torch.testing.assert_close((guess * block.request.primal).sum(1), expected)


def test_what_is_not_along_the_value_is_that_of_the_guess():
    model, x, y = case("linear")
    for_both = (LOSS, Normal(2) + Feedback(2)), (LOSS, Normal(2) + Homogeneous(Feedback(2)))
    plain, corrected = (
        ForwardGradient(model, *arguments, SumOfGuesses(), OWN) for arguments in for_both
    )
    for _ in range(3):
        plain(x, y)
        corrected(x, y)
    blocks = gradient_blocks(plain, x, y), gradient_blocks(corrected, x, y)
    for block, other in zip(*blocks, strict=True):
        value = block.request.primal.detach()
        along = F.normalize(value, dim=1)
        before, after = block.rows()[2:].sum(0), other.rows()[2:].sum(0)
        across = [rows - (rows * along).sum(1, keepdim=True) * along for rows in (before, after)]
        assert across[0].norm() > 1e-3
        assert relative_error([across[1]], [across[0]]) <= 1e-10


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"store_tangents": False}])
def test_the_gradient_is_the_same_whatever_is_split_or_drawn_again(options):
    gradients = []
    for further in ({}, options):
        model, x, y = case("linear", bias=True)
        source = Normal(2) + Homogeneous(Feedback(2))
        gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), OWN, **further)
        for _ in range(3):
            gradient(x, y)
        gradients.append([p.grad for p in model.parameters()])
    assert relative_error(*gradients) <= 1e-10


def test_finite_differences_have_the_same_guesses():
    gradients = []
    for kind in (ForwardGradient, DifferenceGradient):
        model, x, y = case("linear", bias=True)
        gradient = kind(model, LOSS, Normal(2) + Homogeneous(Feedback()), SumOfGuesses(), OWN)
        for _ in range(3):
            gradient(x, y)
        gradients.append([p.grad for p in model.parameters()])
    assert relative_error(*gradients) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-2, 300.0])
def test_small_and_large_values_in_any_precision(dtype, scale):
    """The squares of large values overflow in half precision, and those of small ones vanish."""
    model, x, y = case("linear")
    model = model.to(dtype)
    gradient = ForwardGradient(model, LOSS, Homogeneous(Residual()), SumOfGuesses(), OWN)
    precision = 8 * torch.finfo(dtype).eps
    assert_exact_along_weights(gradient, (scale * x).to(dtype), y, rtol=precision, atol=precision)


def test_one_number_for_every_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, False), nn.ReLU(), nn.Linear(6, 1, False), nn.Flatten(0))
    model = model.double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    loss = nn.MSELoss()
    source = Normal(2) + Homogeneous(Feedback())
    gradient = ForwardGradient(model, loss, source, SumOfGuesses(), OWN)
    assert_exact_along_weights(gradient, x, y)


def test_random_tangents_are_refused():
    with pytest.raises(ValueError, match="should have guesses only"):
        Homogeneous(Normal(2) + Feedback())


def test_guesses_that_are_mixed_afterwards_are_refused():
    with pytest.raises(ValueError, match="mixes them afterwards"):
        Homogeneous(Normalized(Feedback()))


def test_weights_are_refused():
    model, x, y = case("linear")
    source = Normal(2) + Homogeneous(Residual())
    gradient = ForwardGradient(model, LOSS, source, SumOfGuesses(), Weights())
    with pytest.raises(ValueError, match="should be among the tangents of activations"):
        gradient(x, y)
