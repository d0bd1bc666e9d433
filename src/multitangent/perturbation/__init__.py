"""Perturbations: which values of a model the tangents are directions of."""

from multitangent.perturbation._activations import Activations
from multitangent.perturbation._argument import Argument
from multitangent.perturbation._perturbation import (
    BoundPerturbation,
    Inject,
    LazyRun,
    Perturbation,
    Run,
    discount_of,
    no_injection,
)
from multitangent.perturbation._pullback import leaves, without_hooks
from multitangent.perturbation._sites import Site, find_sites
from multitangent.perturbation._weights import Weights

__all__ = [
    "Activations",
    "Argument",
    "BoundPerturbation",
    "Inject",
    "LazyRun",
    "Perturbation",
    "Run",
    "Site",
    "Weights",
    "discount_of",
    "find_sites",
    "leaves",
    "no_injection",
    "without_hooks",
]
