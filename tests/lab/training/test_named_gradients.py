"""From a configuration to its gradient."""

import pytest
import torch
from torch import nn

from multitangent import ControlVariate, Feedback, ForwardGradient
from multitangent.aggregation import SumOfGuesses, WhenLearning
from multitangent.gradient import DifferenceGradient
from multitangent.tangents import Every, Homogeneous, Residual
from multitangent_lab.config import ConfigError, TrainConfig
from multitangent_lab.models import build_model
from multitangent_lab.training import build_gradient

IMAGES, LABELS = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)


def built(model: str) -> ForwardGradient:
    """The gradient that suits a model, after a step."""
    config = TrainConfig(model=model, dataset="mnist").resolved()
    network = build_model(model, (1, 28, 28))
    gradient = build_gradient(config, network, nn.CrossEntropyLoss())
    assert isinstance(gradient, ForwardGradient)
    gradient(IMAGES, LABELS)
    return gradient


def test_guesses_of_a_fully_connected_network_learn_in_some_steps() -> None:
    gradient = built("fc")
    assert isinstance(gradient.tangents, Every)
    assert gradient.tangents.period == 32
    assert any(isinstance(part, Homogeneous) for part in gradient.tangents.parts)


def test_resnet18_is_guessed_for_at_one_place() -> None:
    gradient = built("resnet18")
    assert list(gradient.sites) == ["stage2"]  # the output is exact
    assert sum(gradient.tangents.guesses) == 1
    assert all(p.grad is not None for p in gradient.model.parameters())


def test_a_vision_transformer_takes_the_error_as_it_is() -> None:
    gradient = built("vit")
    assert (gradient.tangents, gradient.aggregator) == (Residual(), SumOfGuesses())


def test_directional_derivatives_from_finite_differences() -> None:
    config = TrainConfig(gradient="mean", differences=True)
    network = build_model("fc", (1, 28, 28))
    assert isinstance(build_gradient(config, network, nn.CrossEntropyLoss()), DifferenceGradient)
    with pytest.raises(ConfigError, match="`differences` should be left out"):
        TrainConfig(gradient="mean", differences=True, simulated=True).resolved()
    plain = TrainConfig(gradient="backpropagation").resolved()
    assert TrainConfig(gradient="backpropagation", differences=True).resolved() == plain


@pytest.mark.parametrize("normalized", [False, True])
def test_the_direct_gradient(normalized: bool) -> None:
    """The part along the value is that of a network without biases, where there are only these."""
    norm = nn.LayerNorm(6) if normalized else nn.ReLU()
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), norm, nn.Linear(6, 10))
    config = TrainConfig(gradient="direct", learn_every=4)
    gradient = build_gradient(config, model, nn.CrossEntropyLoss())
    assert isinstance(gradient, ForwardGradient)
    assert isinstance(gradient.tangents, Every)
    guess, _ = gradient.tangents.parts
    assert isinstance(guess, Feedback if normalized else Homogeneous)
    assert gradient.aggregator == WhenLearning(ControlVariate())
    assert (gradient.tangents.period, gradient.tangents.num_tangents) == (4, 5)
