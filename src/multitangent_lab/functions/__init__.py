"""Closed-form functions, and descent on them for many learning rates and seeds at once."""

from multitangent_lab.functions._descend import Descent, Estimate, TrueGradient, descend
from multitangent_lab.functions._functions import FUNCTIONS, Function

__all__ = ["FUNCTIONS", "Descent", "Estimate", "Function", "TrueGradient", "descend"]
