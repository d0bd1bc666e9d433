"""The gradients by name."""

from __future__ import annotations

from typing import Literal

GradientName = Literal[
    "backpropagation",
    "single",
    "sum",
    "mean",
    "projection",
    "informed",
    "feedback",
    "direct",
    "local",
    "previous",
    "residual",
    "mezo",
]
# With guesses among the tangents: how many tangents they need at least.
WITH_GUESSES = {"informed": 4, "feedback": 3, "direct": 2, "local": 3, "previous": 3}
ChosenName = GradientName | Literal["auto"]  # auto: what suits the model
