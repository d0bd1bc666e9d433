"""Perturbations: which values of a model the tangents are directions of."""

from multitangent.perturbation._activations import Activations, ActivationSweep
from multitangent.perturbation._setting import Perturbation, Setting, Sweep
from multitangent.perturbation._sites import Site, Visitor, observed
from multitangent.perturbation._weights import Weights

__all__ = [
    "ActivationSweep",
    "Activations",
    "Perturbation",
    "Setting",
    "Site",
    "Sweep",
    "Visitor",
    "Weights",
    "observed",
]
