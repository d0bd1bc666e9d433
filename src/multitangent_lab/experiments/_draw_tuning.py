"""Curves of validation loss against forward passes and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from multitangent_lab._looks import finish
from multitangent_lab.experiments._store import Row

_COLOURS = {  # Okabe and Ito
    ("backpropagation", False): "#000000",
    ("mezo", False): "#009E73",
    ("single", False): "#999999",
    ("mean", False): "#D55E00",
    ("projection", False): "#0072B2",
    ("mean", True): "#E69F00",
    ("projection", True): "#56B4E9",
}
_STYLES = {1: "-", 4: "--", 16: "-"}
_NAMES = {"mezo": "MeZO", "single": "single tangent"}
_OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}


def label(method: str, num_tangents: int, guess: bool, optimizer: str) -> str:
    """A gradient and its optimiser in words.

    Examples:
        >>> label("projection", 16, True, "adam")
        'projection, K = 16 with the running mean, Adam'
    """
    count = f", K = {num_tangents}" if num_tangents > 1 else ""
    mean = " with the running mean" if guess else ""
    return f"{_NAMES.get(method, method)}{count}{mean}, {_OPTIMIZERS[optimizer]}"


def draw_curves(runs: Mapping[tuple[Any, ...], Sequence[Sequence[Row]]], path: Path) -> None:
    """Draws the mean over the seeds, and the range from least to most, as a PNG with two panels.

    Args:
        runs: The rows of one run per seed, for every method, K, guess and optimiser.
        path: Where to write the picture.
    """
    figure = Figure(figsize=(13, 5), dpi=150, layout="constrained")
    against_passes, against_seconds = figure.subplots(1, 2, sharey=True)
    for key, of_contender in runs.items():
        _plot(against_passes, "passes", key, of_contender)
        _plot(against_seconds, "seconds", key, of_contender)
    against_passes.set(xlabel="forward passes", ylabel="validation loss, nats a byte")
    against_seconds.set(xlabel="seconds of training (processor time, one thread)")
    figure.legend(
        *against_passes.get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    for axes in (against_passes, against_seconds):
        finish(axes)
    figure.savefig(path)


def _plot(axes: Axes, spent: str, key: tuple[Any, ...], runs: Sequence[Sequence[Row]]) -> None:
    """Draw one curve, up to the first point where a run has diverged."""
    method, num_tangents, guess, optimizer = key
    points = [
        rows
        for rows in zip(*runs, strict=False)
        if all(row["validation_loss"] is not None for row in rows)
    ]
    losses = [[row["validation_loss"] for row in rows] for rows in points]
    x = [fmean(row[spent] for row in rows) for rows in points]
    colour = _COLOURS[method, guess]
    style = ":" if optimizer == "adam" else _STYLES[num_tangents]
    axes.plot(
        x, list(map(fmean, losses)), color=colour, linestyle=style, marker=".", ms=4,
        label=label(*key),
    )  # fmt: skip
    axes.fill_between(
        x, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.15, linewidth=0
    )
