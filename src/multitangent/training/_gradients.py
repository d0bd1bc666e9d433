"""From a configuration to the gradient it names."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from multitangent import (
    Activations,
    ControlVariate,
    Feedback,
    ForwardGradient,
    LocalLoss,
    Mean,
    Normal,
    Orthogonal,
    Previous,
    Projection,
    Rademacher,
    Radial,
    SimulatedGradient,
    Sphere,
    Sum,
    Weights,
)
from multitangent.aggregation import Aggregator
from multitangent.tangents import TangentSource
from multitangent.training.config import TrainConfig


class Gradient(Protocol):
    """What takes the place of `loss.backward()`: `ForwardGradient` and its relatives."""

    def __call__(self, inputs: Tensor, target: Tensor, /) -> Tensor:
        """Returns the loss, detached, and adds to `.grad` of every trainable parameter."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what is needed to continue as if never interrupted."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Continues from where `state_dict` was taken."""


class Backpropagation:
    """The exact gradient, by a backward pass.

    Args:
        model: The model.
        loss: From outputs and targets to a scalar.

    Examples:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> gradient = Backpropagation(model, nn.CrossEntropyLoss())
        >>> value = gradient(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
        >>> value.requires_grad, model.weight.grad.shape
        (False, torch.Size([2, 3]))
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        self.model = model
        self.loss = loss

    def __call__(self, inputs: Tensor, target: Tensor, /) -> Tensor:
        value: Tensor = self.loss(self.model(inputs), target)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        pass


def build_gradient(config: TrainConfig, model: nn.Module, loss: nn.Module) -> Gradient:
    """Returns the gradient that `config` names."""
    if config.gradient == "backpropagation":
        return Backpropagation(model, loss)
    kind = SimulatedGradient if config.simulated else ForwardGradient
    config = config.resolved()
    assert config.share is not None
    assert config.output is not None
    activations = Activations(share=config.share, output=config.output)
    random = SOURCES[config.tangents]
    if config.gradient in GUESSES:
        tangents = random(config.num_tangents - 2) + GUESSES[config.gradient](1) + Radial()
        aggregator: Aggregator = ControlVariate(config.gain)
    else:
        tangents = random(config.num_tangents)
        aggregator = AGGREGATORS[config.gradient]
    return kind(
        model,
        loss,
        tangents=tangents,
        aggregator=aggregator,
        perturb=activations if config.perturb == "activations" else Weights(),
        seed=config.seed,
    )


SOURCES: Mapping[str, Callable[[int], TangentSource]] = {
    "normal": Normal,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "orthogonal": Orthogonal,
}
GUESSES: Mapping[str, Callable[[int], TangentSource]] = {
    "feedback": Feedback,
    "local": LocalLoss,
    "previous": Previous,
}
AGGREGATORS: Mapping[str, Aggregator] = {
    "single": Mean(),
    "sum": Sum(),
    "mean": Mean(),
    "projection": Projection(),
}
