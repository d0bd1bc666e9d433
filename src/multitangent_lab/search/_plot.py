"""The trials of a search, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from matplotlib.figure import Figure


def draw_trials(
    rows: Sequence[tuple[float, float | None, str, int]], path: Path, title: str, what: str
) -> None:
    """Draws the value against the learning rate, one point a trial, earlier ones paler.

    Args:
        rows: Rate, value, state and number of every trial that has ended.
        path: Where to write the picture, a PNG.
        title: The title.
        what: What the value is.
    """
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    done = [(r, v, n) for r, v, s, n in rows if v is not None and isfinite(v) and s == "complete"]
    pruned = [r for r, _, s, _ in rows if s == "pruned"]
    if done:
        rates, values, numbers = zip(*done, strict=True)
        axes.scatter(rates, values, c=numbers, cmap="Blues", edgecolors="#0072B2", label="complete")
        best = min(done, key=lambda trial: trial[1])
        axes.scatter(*best[:2], marker="*", s=200, color="#D55E00", label=f"best: {best[0]:.3g}")
        low, high = min(values), sorted(values)[int(0.75 * (len(values) - 1))]
        margin = max(high - low, 1e-9 * abs(low), 1e-300)
        axes.set_ylim(low - 0.1 * margin, high + margin)  # what diverged would hide all else
    if pruned:
        axes.plot(
            pruned, [0.02] * len(pruned), "|", color="#999999", label="pruned",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set(title=title, xlabel="Learning rate", ylabel=what, xscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
