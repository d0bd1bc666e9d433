"""Train any PyTorch model without a backward pass: multi-tangent forward gradients.

These are the names that most users need. The others are in `multitangent.tangents`,
`multitangent.aggregation`, `multitangent.perturbation`, `multitangent.learning_rate`,
`multitangent.dual` and `multitangent.gradient`.
"""

from multitangent._errors import NonFiniteError
from multitangent.aggregation import ControlVariate, Mean, Projection
from multitangent.gradient import (
    ForwardGradient,
    SimulatedGradient,
    VerificationError,
    forward_gradient,
)
from multitangent.learning_rate import AutoStep
from multitangent.perturbation import Activations, Weights
from multitangent.tangents import Feedback, LocalLoss, Normal, OwnValue, Rademacher

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "AutoStep",
    "ControlVariate",
    "Feedback",
    "ForwardGradient",
    "LocalLoss",
    "Mean",
    "NonFiniteError",
    "Normal",
    "OwnValue",
    "Projection",
    "Rademacher",
    "SimulatedGradient",
    "VerificationError",
    "Weights",
    "forward_gradient",
]
