"""Random functions, models and steps, compared with backpropagation."""

from multitangent_lab.fuzz._case import KINDS, Result, run_case
from multitangent_lab.fuzz._command import run_fuzz

__all__ = ["KINDS", "Result", "run_case", "run_fuzz"]
