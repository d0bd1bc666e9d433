"""Gradients: what users call, and the step that it is made of."""

from multitangent.gradient._along import Line
from multitangent.gradient._assessment import Assessment
from multitangent.gradient._coefficients import Combination, combine
from multitangent.gradient._diagnostics import Diagnostics
from multitangent.gradient._difference import DifferenceGradient, mezo
from multitangent.gradient._estimator import GradientEstimator
from multitangent.gradient._forward_gradient import ForwardGradient
from multitangent.gradient._function import forward_gradient
from multitangent.gradient._simulated import SimulatedGradient
from multitangent.gradient._step import Problem, Step, step
from multitangent.gradient._verification_error import VerificationError

__all__ = [
    "Assessment",
    "Combination",
    "Diagnostics",
    "DifferenceGradient",
    "ForwardGradient",
    "GradientEstimator",
    "Line",
    "Problem",
    "SimulatedGradient",
    "Step",
    "VerificationError",
    "combine",
    "forward_gradient",
    "mezo",
    "step",
]
