"""Engines: how directional derivatives are obtained."""

from multitangent.engine._backpropagation import Backpropagation, applied
from multitangent.engine._engine import Derivatives, Engine
from multitangent.engine._forward_mode import ForwardMode, split_dual
from multitangent.engine._split import SplitError, tolerance
from multitangent.engine._trial import Trial, run_few

__all__ = [
    "Backpropagation",
    "Derivatives",
    "Engine",
    "ForwardMode",
    "SplitError",
    "Trial",
    "applied",
    "run_few",
    "split_dual",
    "tolerance",
]
