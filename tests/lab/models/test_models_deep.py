"""ResNet18 and the vision transformer: counts published with the paper, exactness, no fallback."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import Activations, ForwardGradient, Normal, SimulatedGradient
from multitangent.dual import FallbackWarning
from multitangent.tangents import StandardBasis
from multitangent_lab.models import resnet18, vision_transformer

LOSS = nn.CrossEntropyLoss()


def dimension(model, x):
    gradient = ForwardGradient(model.eval(), LOSS, Normal(1), micro_batch=1)
    gradient(x, torch.zeros(len(x), dtype=torch.int64))
    total = 0
    for part in model:
        x = part(x)
        total += x[0].numel()
    return total


@pytest.mark.parametrize(
    ("model", "shape", "n"),
    [
        (resnet18(3), (3, 32, 32), 11_786),
        (resnet18(1), (1, 28, 28), 9_866),
        (vision_transformer(28, 1), (1, 28, 28), 64_010),
        (vision_transformer(32, 3), (3, 32, 32), 83_210),
    ],
    ids=["resnet18 cifar10", "resnet18 mnist", "vit mnist", "vit cifar10"],
)
def test_dimension_of_activity_perturbation(model, shape, n):
    """Table I."""
    assert dimension(model, torch.randn(2, *shape)) == n


def test_parameters():
    assert sum(p.numel() for p in resnet18(3, 10).parameters()) == 11_181_642


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet_has_rules_for_everything(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        gradient = ForwardGradient(resnet18(norm=norm), LOSS, Normal(2))
        gradient(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    assert gradient.diagnostics.fallbacks == frozenset()


def test_vision_transformer_has_rules_for_everything():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        ForwardGradient(vision_transformer(8, 1, dropout=0.1), LOSS, Normal(2))(
            torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
        )


def tiny_vit():
    return vision_transformer(8, 1, layers=2, heads=2, hidden=8, mlp=12), (1, 8, 8), 5 * 8 + 10


def tiny_resnet():
    return resnet18(1, norm="group"), (1, 8, 8), 64 * 4 * 2 + 128 + 256 + 512 + 10


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("statistics", ["frozen", "coupled"])
def test_as_many_tangents_as_dimensions_give_the_exact_gradient(make, statistics):
    torch.manual_seed(0)
    model, shape, n = make()
    model = model.double()
    x, y = torch.randn(2, *shape, dtype=torch.float64), torch.tensor([1, 3])
    LOSS(model(x), y).backward()
    true = gradients(model)
    SimulatedGradient(model, LOSS, StandardBasis(n), statistics=statistics)(x, y)
    assert relative_error(gradients(model), true) <= 1e-10


def test_forward_mode_is_exact_on_the_vision_transformer():
    torch.manual_seed(0)
    model, shape, n = tiny_vit()
    x, y = torch.randn(4, *shape), torch.tensor([1, 3, 0, 2])
    LOSS(model(x), y).backward()
    true = gradients(model)
    for options in (Activations(), Activations(output="exact", recompute=True)):
        ForwardGradient(model, LOSS, StandardBasis(n), perturb=options, micro_batch=3)(x, y)
        assert relative_error(gradients(model), true) <= 1e-5


def test_forward_mode_equals_the_simulation_on_resnet():
    torch.manual_seed(0)
    model = resnet18(1, norm="batch").double()
    x, y = torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.tensor([1, 3, 0, 2])
    SimulatedGradient(model, LOSS, Normal(3))(x, y)
    expected = gradients(model)
    ForwardGradient(model, LOSS, Normal(3), micro_batch=3)(x, y)
    assert relative_error(gradients(model), expected) <= 1e-10


@pytest.mark.parametrize("arguments", [{"norm": "layer"}, {"norm": ""}])
def test_refuses_an_unknown_norm(arguments):
    with pytest.raises(ValueError, match="`norm` should be one of"):
        resnet18(**arguments)


@pytest.mark.parametrize("arguments", [{"patch_size": 5}, {"heads": 3}, {"layers": 1}])
def test_refuses_shapes_that_do_not_fit(arguments):
    with pytest.raises(ValueError, match="`patch_size` should divide"):
        vision_transformer(32, 3, **arguments)
