"""Curves against the number of tangents, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Told apart by colour-blind readers (Okabe and Ito), and by their markers without colours.
_LOOKS = {
    "backpropagation": ("#000000", "x"),
    "forward_gradient": ("#D55E00", "o"),
    "vmap_jvp": ("#0072B2", "s"),
    "python_loop": ("#009E73", "^"),
    "activations": ("#D55E00", "o"),
    "activations_recomputed": ("#E69F00", "s"),
    "weights_redrawn": ("#CC79A7", "^"),
    "batch": ("#D55E00", "o"),
    "sample": ("#0072B2", "s"),
}

Rows = Sequence[Mapping[str, Any]]


def draw_tangents(rows: Rows, path: Path, title: str) -> None:
    """Draws time and memory of a step against K.

    Args:
        rows: The rows of `curve_of_tangents`.
        path: Where to write the picture, a PNG.
        title: The title of the whole figure.
    """
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    figure.suptitle(title)
    for axes, unit, label in zip(
        figure.subplots(1, 2), ("_ms", "_mib"), ("Time of a step (ms)", "Peak memory (MiB)"),
        strict=True,
    ):  # fmt: skip
        for column in rows[0]:
            if column.endswith(unit):
                _line(axes, rows, column, column.removesuffix(unit))
        _finish(axes, rows, label)
    figure.savefig(path)


def draw_cosines(rows: Rows, path: Path, title: str) -> None:
    """Draws what a step's time buys against K.

    Args:
        rows: The rows of `curve_of_cosines`.
        path: Where to write the picture, a PNG.
        title: The title of the whole figure.
    """
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    figure.suptitle(title)
    labels = {
        "squared_cosine": "Squared cosine with the true gradient",
        "squared_cosine_per_ms": "Squared cosine per millisecond",
    }
    for axes, (column, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for share in ("batch", "sample"):
            of_share = [row for row in rows if row["share"] == share]
            _line(axes, of_share, column, share)
        exact = [
            {**row, "backpropagation": 1 if column == "squared_cosine" else 1 / row[_TIME]}
            for row in rows
            if row["share"] == "batch"
        ]
        _line(axes, exact, "backpropagation", "backpropagation")
        _finish(axes, rows, label)
    figure.savefig(path)


_TIME = "backpropagation_ms"


def _line(axes: Axes, rows: Rows, column: str, name: str) -> None:
    colour, marker = _LOOKS[name]
    counts = [row["num_tangents"] for row in rows]
    values = [row[column] for row in rows]
    label = f'share="{name}"' if name in ("batch", "sample") else name.replace("_", " ")
    axes.plot(counts, values, color=colour, marker=marker, label=label)


def _finish(axes: Axes, rows: Rows, label: str) -> None:
    counts = sorted({row["num_tangents"] for row in rows})
    axes.set(title=label, xlabel="K, number of tangents", xscale="log", yscale="log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
