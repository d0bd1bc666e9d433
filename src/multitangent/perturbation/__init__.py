"""Perturbations: which values of a model the tangents are directions of."""

from multitangent.perturbation._activations import Activations
from multitangent.perturbation._setting import Perturbation, Setting, Sweep
from multitangent.perturbation._weights import Weights

__all__ = ["Activations", "Perturbation", "Setting", "Sweep", "Weights"]
