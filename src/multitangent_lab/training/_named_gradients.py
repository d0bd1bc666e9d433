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
    OwnValue,
    Projection,
    Rademacher,
    SimulatedGradient,
    Weights,
)
from multitangent.aggregation import Aggregator, Sum, SumOfGuesses, WhenLearning
from multitangent.gradient import DifferenceGradient, GradientEstimator, mezo
from multitangent.objective import normalizes_batches
from multitangent.perturbation import find_sites
from multitangent.tangents import (
    Every,
    Homogeneous,
    LowRank,
    Orthogonal,
    Residual,
    RunningMean,
    ScaledByRMS,
    Sphere,
    TangentSource,
)
from multitangent_lab.config import WITH_GUESSES, TrainConfig
from multitangent_lab.data import Loss


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
        loss: From outputs and targets to one number per sample, or to their mean.

    Examples:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> gradient = Backpropagation(model, nn.CrossEntropyLoss())
        >>> value = gradient(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
        >>> value.requires_grad, model.weight.grad.shape
        (False, torch.Size([2, 3]))
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = model
        self.loss = loss

    def __call__(self, inputs: Tensor, target: Tensor, /) -> Tensor:
        value: Tensor = self.loss(self.model(inputs), target).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        pass


def build_gradient(
    config: TrainConfig, model: nn.Module, loss: Loss, *, has_classes: bool = True
) -> Gradient:
    """Returns the gradient that `config` names.

    Args:
        config: The configuration.
        model: The model.
        loss: A function from outputs and targets to one number per sample or to their mean, and to
            one number per token for `credit="token"`.
        has_classes: Whether a sample has one class as its target.
    """
    if config.gradient == "backpropagation":
        return Backpropagation(model, loss)
    if config.gradient == "mezo":
        return mezo(model, loss, seed=config.seed)
    config = config.resolved()
    kind: type[GradientEstimator] = ForwardGradient
    if config.simulated:
        kind = SimulatedGradient
    elif config.differences:
        kind = DifferenceGradient
    assert config.share is not None
    assert config.output is not None
    activations = Activations(
        sites=config.sites,
        share=config.share,
        output=config.output,
        credit=config.credit,
        discount=config.discount,
    )
    assert config.num_tangents is not None
    perturb = activations if config.perturb == "activations" else Weights()
    random = SOURCES[config.tangents]
    tangents: TangentSource
    aggregator: Aggregator
    if config.gradient == "residual":
        tangents, aggregator = Residual(), SumOfGuesses()
    elif config.gradient == "direct":
        feedback = Feedback(step_size=1.0)  # few steps learn, so that each should learn much
        guess = Homogeneous(feedback) if _is_homogeneous(model) else feedback
        tangents = _learning(config, random, guess)
        aggregator = WhenLearning(ControlVariate(config.gain))
    elif config.gradient in WITH_GUESSES:
        layers = len(config.sites or find_sites(model)) if config.perturb == "activations" else 0
        layers -= config.output == "exact"
        normalized = any(normalizes_batches(module) for module in model.modules())
        guesses = guessing(
            config.gradient,
            config.num_tangents,
            layers,
            own_value=not normalized,
            few_outputs=has_classes,
        )
        tangents = _learning(config, random, guesses)
        aggregator = ControlVariate(config.gain)
    else:
        tangents = random(config.num_tangents)
        assert config.gradient != "auto"
        aggregator = AGGREGATORS[config.gradient]
    return kind(
        model,
        loss,
        tangents=tangents,
        aggregator=aggregator,
        perturb=perturb,
        seed=config.seed,
    )


def _learning(
    config: TrainConfig, random: Callable[[int], TangentSource], guesses: TangentSource
) -> TangentSource:
    """Guesses, and the random tangents from which they learn in the steps that are theirs."""
    assert config.num_tangents is not None
    assert config.learn_every is not None
    tangents = ScaledByRMS(random(config.num_tangents - guesses.num_tangents)) + guesses
    return Every(config.learn_every, tangents) if config.learn_every > 1 else tangents


def _is_homogeneous(model: nn.Module) -> bool:
    """Whether the output is as many times as large as any activation, but for biases."""
    return all(type(module) in _HOMOGENEOUS for module in model.modules())


_HOMOGENEOUS = (
    nn.Sequential,
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Flatten,
    nn.Identity,
)


def guessing(
    gradient: str,
    num_tangents: int,
    layers: int,
    *,
    own_value: bool = True,
    few_outputs: bool = True,
) -> TangentSource:
    """Returns the guesses among K tangents.

    Two tangents are left to chance, if there are enough. `Feedback`, or without it `LocalLoss`, has
    a tangent for every layer that is guessed for, as far as the rest goes.

    Args:
        gradient: One of `WITH_GUESSES`.
        num_tangents: K.
        layers: How many layers are guessed for.
        own_value: Whether the value itself is among the tangents. Where batch normalisation
            follows, the loss does not depend on the value's scale, which constant statistics do not
            show.
        few_outputs: Whether `informed` may learn a matrix for every output, as for classes. Else,
            as for the logits of every token, its guess is the running mean.

    Examples:
        >>> guessing("feedback", 8, 2)
        Feedback(num_tangents=2, step_size=0.5, gated=True) + OwnValue(num_tangents=1)
    """
    others = (gradient == "informed") + own_value
    count = max(1, min(layers, num_tangents - _LEFT_TO_CHANCE - others))
    sources: Mapping[str, Callable[[], TangentSource]] = {
        "informed": lambda: Feedback(count) + LocalLoss() if few_outputs else RunningMean(),
        "feedback": lambda: Feedback(count),
        "local": lambda: LocalLoss(count),
        "previous": RunningMean,
    }
    guesses = sources[gradient]()
    return guesses + OwnValue() if own_value else guesses


_LEFT_TO_CHANCE = 2


SOURCES: Mapping[str, Callable[[int], TangentSource]] = {
    "normal": Normal,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "orthogonal": Orthogonal,
    "low-rank": LowRank,
}
AGGREGATORS: Mapping[str, Aggregator] = {
    "single": Mean(),
    "sum": Sum(),
    "mean": Mean(),
    "projection": Projection(),
}
