"""Dual tensors: a primal with K tangents, pushed through unmodified PyTorch code."""

from multitangent.dual import _rules as _rules  # registers the rules
from multitangent.dual._algebra import add, add_to, full_tangents, primal, tangents, times
from multitangent.dual._dual_tensor import DualTensor, with_rows
from multitangent.dual._part_of_batch import PartOfBatch, Statistics
from multitangent.dual._registry import (
    FallbackWarning,
    has_rule,
    record_fallbacks,
    register_composite,
    register_rule,
)
from multitangent.dual._reuse import Recorded

__all__ = [
    "DualTensor",
    "FallbackWarning",
    "PartOfBatch",
    "Recorded",
    "Statistics",
    "add",
    "add_to",
    "full_tangents",
    "has_rule",
    "primal",
    "record_fallbacks",
    "register_composite",
    "register_rule",
    "tangents",
    "times",
    "with_rows",
]
