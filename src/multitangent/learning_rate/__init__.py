"""Learning rates: in closed form, and set by the curvature along the steps."""

from multitangent.learning_rate._auto_step import AutoStep
from multitangent.learning_rate._rule import StepRule
from multitangent.learning_rate._suggest import suggest

__all__ = ["AutoStep", "StepRule", "suggest"]
