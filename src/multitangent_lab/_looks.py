"""The paper's eight gradients: what they are called and how they are drawn."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

# Name and K, in the order of the paper's Table I.
GRADIENTS = (
    ("backpropagation", 1),
    ("single", 1),
    ("mean", 2),
    ("mean", 4),
    ("mean", 16),
    ("projection", 2),
    ("projection", 4),
    ("projection", 16),
)
_COLOURS = {
    "mean": "#D55E00",
    "projection": "#0072B2",
    "backpropagation": "#000000",
    "single": "#999999",
}
_STYLES = {1: "-", 2: ":", 4: "--", 16: "-", 64: "-."}
_SYMBOLS = {
    "backpropagation": r"$\nabla f$",
    "single": r"$g_v$",
    "mean": r"$\overline{g_V}$",
    "projection": r"$P_U$",
}


def label(gradient: str, num_tangents: int) -> str:
    """The paper's symbol, with K where there is a choice.

    Examples:
        >>> label("projection", 16)
        '$P_U$, K = 16'
    """
    symbol = _SYMBOLS[gradient]
    return f"{symbol}, K = {num_tangents}" if gradient in ("mean", "projection") else symbol


def look(gradient: str, num_tangents: int) -> dict[str, Any]:
    """Colour and style of a line: one colour for each way to combine, one style for each K."""
    return {"color": _COLOURS[gradient], "linestyle": _STYLES[num_tangents], "marker": ".", "ms": 4}


def finish(axes: Axes) -> None:
    """What all panels have in common."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
