"""Learning curves, drawn."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from pandas import DataFrame

# Told apart by colour-blind readers (Okabe and Ito), and by line style without colours.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def draw_curves(
    runs: Mapping[str, "DataFrame"], path: Path, title: str = "", *, loss_unit: str = ""
) -> None:
    """Draws validation error and training loss against the epoch, one line per run.

    Runs without errors have their validation loss in place of them.

    Args:
        runs: The content of `metrics.csv` by the name of the run, with an epoch or more each.
        path: Where to write the picture, a PNG.
        title: The title of the whole figure.
        loss_unit: What losses are measured in.
    """
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title)
    unit = f" ({loss_unit})" if loss_unit else ""
    if any(run["validation_error"].notna().any() for run in runs.values()):
        _draw(left, runs, "validation_error", 100, "Validation error (%)")
    else:
        _draw(left, runs, "validation_loss", 1, f"Validation loss{unit}")
    _draw(right, runs, "train_loss", 1, f"Training loss{unit}")
    if len(runs) > 1:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _draw(
    axes: Axes, runs: Mapping[str, "DataFrame"], column: str, scale: float, title: str
) -> None:
    for (name, run), colour, style in zip(runs.items(), cycle(COLOURS), cycle(STYLES)):
        axes.plot(run["epoch"], scale * run[column], color=colour, linestyle=style, label=name)
    axes.set(title=title, xlabel="Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if any((run[column] > 0).any() for run in runs.values()):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
