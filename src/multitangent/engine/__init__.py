"""Engines: how directional derivatives are obtained."""

from multitangent.engine._backpropagation import Backpropagation
from multitangent.engine._engine import Derivatives, Engine
from multitangent.engine._forward_mode import ForwardMode, split_dual
from multitangent.engine._micro_batch import micro_batch_size

__all__ = [
    "Backpropagation",
    "Derivatives",
    "Engine",
    "ForwardMode",
    "micro_batch_size",
    "split_dual",
]
