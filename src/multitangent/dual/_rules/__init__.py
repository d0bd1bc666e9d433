"""The rules, one family of functions a file; importing this package registers them."""

from multitangent.dual._rules import (
    arithmetic,
    contractions,
    elementwise,
    indexing,
    losses,
    queries,
    reductions,
    shapes,
    softmax,
)

__all__ = [
    "arithmetic",
    "contractions",
    "elementwise",
    "indexing",
    "losses",
    "queries",
    "reductions",
    "shapes",
    "softmax",
]
