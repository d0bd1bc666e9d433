"""Dual tensors: a primal with K tangents, pushed through unmodified PyTorch code."""

from multitangent.dual import _rules as _rules  # registers the rules
from multitangent.dual._adopted import ordinary_afterwards
from multitangent.dual._algebra import add, add_to, full_tangents, primal, tangents, times
from multitangent.dual._arguments import find_duals, map_duals
from multitangent.dual._deferred import Deferred, Drawn, Factored, computed
from multitangent.dual._dispatch import result_of
from multitangent.dual._dual_tensor import DualTensor, as_parameter, pad_rows, without_base
from multitangent.dual._factors import Factors, Part
from multitangent.dual._foreign_functions import foreign_functions
from multitangent.dual._grad_mode import ObeyedGradMode, constant
from multitangent.dual._graph import GRAPH_QUERIES
from multitangent.dual._kernels import FASTER
from multitangent.dual._linear_modules import WrongTransposeError, register_linear_module
from multitangent.dual._observed import Observer, observed_functions
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
from multitangent.dual._rules.normalization import constant_statistics
from multitangent.dual._sweep import sweep

__all__ = [
    "COMPOSITES",
    "FASTER",
    "GRAPH_QUERIES",
    "Deferred",
    "Drawn",
    "DualTensor",
    "Factored",
    "Factors",
    "FallbackWarning",
    "ObeyedGradMode",
    "Observer",
    "Part",
    "WrongTransposeError",
    "add",
    "add_to",
    "as_parameter",
    "attention_with_dropout",
    "computed",
    "constant",
    "constant_statistics",
    "find_duals",
    "foreign_functions",
    "full_tangents",
    "function_name",
    "has_rule",
    "is_query",
    "map_duals",
    "observed_functions",
    "ordinary_afterwards",
    "pad_rows",
    "primal",
    "record_fallbacks",
    "register_composite",
    "register_linear_module",
    "register_rule",
    "result_of",
    "sweep",
    "tangents",
    "times",
    "without_base",
]
