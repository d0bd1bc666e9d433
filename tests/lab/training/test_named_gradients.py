"""From a configuration to its gradient."""

import torch
from torch import nn

from multitangent import Feedback, ForwardGradient
from multitangent.aggregation import SumOfGuesses
from multitangent.tangents import Every, Residual
from multitangent_lab.config import TrainConfig
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
    assert gradient.tangents.period == 16
    assert any(isinstance(part, Feedback) for part in gradient.tangents.parts)


def test_resnet18_is_guessed_for_at_one_place() -> None:
    gradient = built("resnet18")
    assert list(gradient.sites) == ["stage2"]  # the output is exact
    assert sum(gradient.tangents.guesses) == 1
    assert all(p.grad is not None for p in gradient.model.parameters())


def test_a_vision_transformer_takes_the_error_as_it_is() -> None:
    gradient = built("vit")
    assert (gradient.tangents, gradient.aggregator) == (Residual(), SumOfGuesses())
