"""Whether a model fits, what a step costs, and what can be repaired."""

from multitangent.diagnosis._cost import Cost, measure_cost
from multitangent.diagnosis._doctor import doctor
from multitangent.diagnosis._functions import find_functions
from multitangent.diagnosis._remedies import repair
from multitangent.diagnosis._report import Finding, Report

__all__ = ["Cost", "Finding", "Report", "doctor", "find_functions", "measure_cost", "repair"]
