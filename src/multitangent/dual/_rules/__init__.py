"""The rules, one family of functions a file; importing this package registers them."""

from multitangent.dual._rules import (
    arithmetic,
    attention,
    contractions,
    convolution,
    elementwise,
    indexing,
    losses,
    normalization,
    pooling,
    queries,
    reductions,
    resizing,
    shapes,
    softmax,
)

__all__ = [
    "arithmetic",
    "attention",
    "contractions",
    "convolution",
    "elementwise",
    "indexing",
    "losses",
    "normalization",
    "pooling",
    "queries",
    "reductions",
    "resizing",
    "shapes",
    "softmax",
]
