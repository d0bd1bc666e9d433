"""Engines: how directional derivatives are obtained."""

from multitangent.engine._backpropagation import Backpropagation, applied
from multitangent.engine._engine import Derivatives, Engine, precision_of
from multitangent.engine._finite_differences import FiniteDifferences, default_epsilon
from multitangent.engine._forward_mode import ForwardMode, split_dual
from multitangent.engine._no_derivatives import NoDerivatives
from multitangent.engine._split import SplitError, agree, tolerance
from multitangent.engine._trial import Trial, run_few

__all__ = [
    "Backpropagation",
    "Derivatives",
    "Engine",
    "FiniteDifferences",
    "ForwardMode",
    "NoDerivatives",
    "SplitError",
    "Trial",
    "agree",
    "applied",
    "default_epsilon",
    "precision_of",
    "run_few",
    "split_dual",
    "tolerance",
]
