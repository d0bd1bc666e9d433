"""Dual tensors: a primal with K tangents, pushed through unmodified PyTorch code."""

from multitangent.dual import _rules as _rules  # registers the rules
from multitangent.dual._algebra import add, add_to, full_tangents, primal, tangents, times
from multitangent.dual._custom_function import custom_functions
from multitangent.dual._deferred import Deferred, Drawn, OnUse
from multitangent.dual._dispatch import result_of
from multitangent.dual._dual_tensor import DualTensor, pad_rows
from multitangent.dual._grad_mode import ObeyedGradMode, constant
from multitangent.dual._kernels import FASTER
from multitangent.dual._registry import (
    COMPOSITES,
    FallbackWarning,
    function_name,
    has_rule,
    is_query,
    record_fallbacks,
    register_composite,
    register_rule,
)
from multitangent.dual._rules.attention import attention_with_dropout

__all__ = [
    "COMPOSITES",
    "FASTER",
    "Deferred",
    "Drawn",
    "DualTensor",
    "FallbackWarning",
    "ObeyedGradMode",
    "OnUse",
    "add",
    "add_to",
    "attention_with_dropout",
    "constant",
    "custom_functions",
    "full_tangents",
    "function_name",
    "has_rule",
    "is_query",
    "pad_rows",
    "primal",
    "record_fallbacks",
    "register_composite",
    "register_rule",
    "result_of",
    "tangents",
    "times",
]
