"""The quality of gradients, drawn."""

import re
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from pandas import DataFrame

_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def draw_quality(runs: Mapping[str, "DataFrame"], path: Path, title: str = "") -> None:
    """Draws what `QualityFile` wrote, one column of panels a run.

    Above, the cosine with the true gradient of every site's parameters, from the first site (dark)
    to the last (light); below, the share of the gradient's squared length in every source's span.

    Args:
        runs: The content of `quality.csv` by the name of the run.
        path: Where to write the picture, a PNG.
        title: The title of the whole figure.
    """
    figure = Figure(figsize=(1.5 + 3.6 * len(runs), 7.2), dpi=130, layout="constrained")
    panels = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    if title:
        figure.suptitle(title)
    for column, (name, run) in enumerate(runs.items()):
        above, below = panels[0][column], panels[1][column]
        _lines(above, run[run["quantity"] == "cosine"], "parameters of site")
        _lines(below, run[run["quantity"] == "captured"], "span of")
        above.set_title(name)
    values = [run.loc[run["quantity"] == "cosine", "value"].min() for run in runs.values()]
    panels[0][0].set_ylim(min(0.0, *values) - 0.02, 1.02)  # the panels of a row share it
    panels[1][0].set_ylim(0, 1.02)
    panels[0][0].set_ylabel("Cosine with the true gradient")
    panels[1][0].set_ylabel("Share of its squared length captured")
    figure.supxlabel("Epoch, at its beginning", fontsize="medium")
    figure.savefig(path)


def _lines(axes: Axes, table: "DataFrame", title: str) -> None:
    places = [place for place in table["place"].unique() if place != "all"]
    colours = matplotlib.colormaps["viridis"]
    for i, (place, style) in enumerate(zip(places, cycle(_STYLES))):
        rows = table[table["place"] == place]
        colour = colours(0.95 * i / max(len(places) - 1, 1))
        axes.plot(rows["epoch"], rows["value"], color=colour, linestyle=style, label=_short(place))
    total = table[table["place"] == "all"]
    axes.plot(total["epoch"], total["value"], color="black", linewidth=2.2, label="all")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=7,
        frameon=False,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        title=title,
        title_fontsize=7,
    )


def _short(place: str) -> str:
    """A source's text without its numbers; the name of a site as it is.

    Examples:
        >>> _short("ScaledByRMS(inner=Normal(num_tangents=2), decay=0.9) #2"), _short("layer.1")
        ('ScaledByRMS(Normal) #2', 'layer.1')
    """
    text, mark, count = place.partition(" #")
    names = re.findall(r"\w+(?=\()", text)
    if not names:
        return place
    return names[0] + "".join(f"({name})" for name in names[1:]) + mark + count
