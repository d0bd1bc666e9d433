"""Experiments as values: what to run, what to store, what to draw."""

from multitangent_lab.experiments._command import finish, run_reproduce
from multitangent_lab.experiments._experiment import Claim, Context, Experiment
from multitangent_lab.experiments._store import Cell, OutOfTimeError, Row, Store
from multitangent_lab.experiments._workers import experiment_of

__all__ = [
    "Cell",
    "Claim",
    "Context",
    "Experiment",
    "OutOfTimeError",
    "Row",
    "Store",
    "experiment_of",
    "finish",
    "run_reproduce",
]
