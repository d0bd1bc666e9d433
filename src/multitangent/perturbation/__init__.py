"""Perturbations: which values of a model the tangents are directions of."""

from multitangent.perturbation._activation_sweep import ActivationSweep
from multitangent.perturbation._activations import Activations
from multitangent.perturbation._line import Line, line
from multitangent.perturbation._micro_batch import micro_batch_size
from multitangent.perturbation._setting import (
    BoundPerturbation,
    Perturbation,
    Setting,
    Sweep,
    accumulate,
    normalizes_batches,
)
from multitangent.perturbation._sites import Site, Visitor, observed
from multitangent.perturbation._weights import Weights

__all__ = [
    "ActivationSweep",
    "Activations",
    "BoundPerturbation",
    "Line",
    "Perturbation",
    "Setting",
    "Site",
    "Sweep",
    "Visitor",
    "Weights",
    "accumulate",
    "line",
    "micro_batch_size",
    "normalizes_batches",
    "observed",
]
