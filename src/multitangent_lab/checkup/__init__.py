"""The command `multitangent doctor`, and the model and batch that it looks at."""

from multitangent_lab.checkup._case import Case, make_case
from multitangent_lab.checkup._command import run_doctor

__all__ = ["Case", "make_case", "run_doctor"]
