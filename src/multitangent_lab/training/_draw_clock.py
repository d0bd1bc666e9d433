"""Validation losses against time and steps, drawn."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from multitangent_lab._looks import finish
from multitangent_lab.training._clock import ABOVE
from multitangent_lab.training._curves import COLOURS, STYLES

if TYPE_CHECKING:
    from pandas import DataFrame


def draw_clock(
    runs: Mapping[str, Sequence["DataFrame"]],
    loss: float | None,
    path: Path,
    title: str = "",
    *,
    loss_unit: str = "",
) -> None:
    """Draws the validation loss against seconds of training, and against steps.

    The picture cuts off losses above those at the start, such as those of a run that diverges.

    Args:
        runs: The tables of `TrainResult.progress`, one or more for each gradient (such as one for
            each seed), by the name of the gradient.
        loss: The loss to reach. The picture marks it, and the losses a little above it. None for
            none.
        path: Where to write the picture, a PNG.
        title: The title of the whole figure.
        loss_unit: What losses are measured in.
    """
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    against_time, against_steps = figure.subplots(1, 2, sharey=True)
    if title:
        figure.suptitle(title)
    for axes, column in ((against_time, "seconds"), (against_steps, "step")):
        for (name, tables), colour, style in zip(runs.items(), cycle(COLOURS), cycle(STYLES)):
            for i, table in enumerate(tables):
                label = name if i == 0 else None
                axes.plot(
                    table[column],
                    table["validation_loss"],
                    color=colour,
                    linestyle=style,
                    linewidth=1.2,
                    label=label,
                )
        for level in [loss * (1 + above) for above in ABOVE] if loss is not None else []:
            axes.axhline(level, color="grey", linewidth=0.7, linestyle=":")
        _scale(axes)
    losses = [table["validation_loss"] for tables in runs.values() for table in tables]
    least = min([*(float(of_run.min()) for of_run in losses), *([loss] if loss else [])])
    against_time.set_ylim(0.95 * least, 1.1 * max(float(of_run.iloc[0]) for of_run in losses))
    unit = f" ({loss_unit})" if loss_unit else ""
    against_time.set(xlabel="Seconds of training", ylabel=f"Validation loss{unit}")
    against_steps.set(xlabel="Steps")
    handles, labels = against_time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def _scale(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    finish(axes)
