"""Train any PyTorch model without a backward pass: multi-tangent forward gradients."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multitangent._forward_gradient import ForwardGradient
    from multitangent._function import forward_gradient
    from multitangent._simulated import SimulatedGradient
    from multitangent.aggregation import Best, ControlVariate, Mean, Projection, Rescaled, Sum
    from multitangent.learning_rate import AutoStep
    from multitangent.perturbation import Activations, Weights
    from multitangent.tangents import (
        Balanced,
        Cone,
        Feedback,
        LocalLoss,
        Normal,
        Normalized,
        Orthogonal,
        Previous,
        Rademacher,
        Radial,
        Sphere,
        StandardBasis,
    )

__version__ = "0.1.0"

_HOMES = {
    "_forward_gradient": ("ForwardGradient",),
    "_function": ("forward_gradient",),
    "_simulated": ("SimulatedGradient",),
    "aggregation": ("Best", "ControlVariate", "Mean", "Projection", "Rescaled", "Sum"),
    "learning_rate": ("AutoStep",),
    "perturbation": ("Activations", "Weights"),
    "tangents": (
        "Balanced",
        "Cone",
        "Feedback",
        "LocalLoss",
        "Normal",
        "Normalized",
        "Orthogonal",
        "Previous",
        "Rademacher",
        "Radial",
        "Sphere",
        "StandardBasis",
    ),
}

__all__ = [
    "Activations",
    "AutoStep",
    "Balanced",
    "Best",
    "Cone",
    "ControlVariate",
    "Feedback",
    "ForwardGradient",
    "LocalLoss",
    "Mean",
    "Normal",
    "Normalized",
    "Orthogonal",
    "Previous",
    "Projection",
    "Rademacher",
    "Radial",
    "Rescaled",
    "SimulatedGradient",
    "Sphere",
    "StandardBasis",
    "Sum",
    "Weights",
    "forward_gradient",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Load torch only when a name is used, so that the command line answers at once."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"multitangent.{home}"), name)
    raise AttributeError(f"module 'multitangent' has no attribute {name!r}")
