"""Suggested learning rates against searched ones, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from multitangent_lab._looks import finish

_COLOURS = {"mean": "#D55E00", "projection": "#0072B2"}  # Okabe and Ito


def draw_rates(rows: Sequence[dict[str, Any]], panel: str, path: Path) -> None:
    """Draws the suggested rate against the searched one, as a PNG.

    Args:
        rows: With `aggregator`, `num_tangents`, `suggested_rate`, `searched_rate` and
            `suggested_is_no_worse`.
        panel: The column by which rows are divided into panels.
        path: Where to write the picture.
    """
    names = list(dict.fromkeys(row[panel] for row in rows))
    figure = Figure(figsize=(4 * len(names), 4.2), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _scatter(axes, [row for row in rows if row[panel] == name])
        rates = [row[which] for row in rows for which in ("searched_rate", "suggested_rate")]
        ends = min(rates) / 2, max(rates) * 2
        axes.plot(ends, ends, color="#999999", linewidth=1)
        axes.set(title=name, xlabel="searched rate", xscale="log", yscale="log")
        axes.set(xlim=ends, ylim=ends, ylabel="suggested rate")
        axes.legend(frameon=False, fontsize=8)
        finish(axes)
    figure.savefig(path)


def _scatter(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """One mark a row: full where the suggestion is no worse, larger for more tangents."""
    for aggregator, colour in _COLOURS.items():
        for no_worse in (True, False):
            some = [
                row
                for row in rows
                if (row["aggregator"], row["suggested_is_no_worse"]) == (aggregator, no_worse)
            ]
            if some:
                axes.scatter(
                    [row["searched_rate"] for row in some],
                    [row["suggested_rate"] for row in some],
                    s=[20 + 6 * row["num_tangents"] for row in some],
                    edgecolors=colour,
                    facecolors=colour if no_worse else "none",
                    alpha=0.7 if no_worse else 1,
                    label=f"{aggregator}, value {'no worse' if no_worse else 'worse'}",
                )
