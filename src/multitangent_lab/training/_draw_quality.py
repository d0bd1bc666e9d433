"""The quality of gradients, drawn."""

import re
from collections.abc import Mapping, Sequence
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

    Each panel has a line for the parameters of every site, from the first site (dark) to the last
    (light). The panel at the top has the cosine of one estimate with the true gradient. With
    several estimates, the next panels have the cosine of their mean, which has less noise, and the
    limit of this cosine, which shows the bias. The panel at the bottom has the share of the
    gradient's squared length in every source's span.

    Args:
        runs: The content of `quality.csv` by the name of the run.
        path: Where to write the picture, a PNG.
        title: The title of the whole figure.
    """
    present = {quantity for run in runs.values() for quantity in run["quantity"]}
    shown = [quantity for quantity in _LABELS if quantity in present]
    size = (1.5 + 3.6 * len(runs), 3.6 * len(shown))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(len(shown), len(runs), squeeze=False, sharey="row")
    if title:
        figure.suptitle(title)
    for row, quantity in zip(panels, shown, strict=True):
        for axes, run in zip(row, runs.values(), strict=True):
            is_share = quantity == "captured"
            of_places = run[run["quantity"] == (quantity if is_share else "cosine")]
            places = [place for place in of_places["place"].unique() if place != "all"]
            kind = "span of" if is_share else "parameters of site"
            _lines(axes, run[run["quantity"] == quantity], places, kind)
        row[0].set_ylabel(_label(quantity, runs))
        values = [v for run in runs.values() for v in run.loc[run["quantity"] == quantity, "value"]]
        row[0].set_ylim(min(0.0, *values) - 0.02, 1.02)  # the panels of a row share it
    for axes, name in zip(panels[0], runs, strict=True):
        axes.set_title(name)
    figure.supxlabel("Epoch, at its beginning", fontsize="medium")
    figure.savefig(path)


_LABELS = {
    "cosine": "Cosine with the true gradient",
    "cosine_of_mean": "The same of the mean of {} estimates",
    "limit": "What that levels off at",
    "captured": "Share of its squared length captured",
}


def _label(quantity: str, runs: Mapping[str, "DataFrame"]) -> str:
    counts = [run.loc[run["quantity"] == "estimates", "value"].max() for run in runs.values()]
    count = max((int(count) for count in counts if count > 0), default=0)
    return _LABELS[quantity].format(count)


def _lines(axes: Axes, table: "DataFrame", places: Sequence[str], title: str) -> None:
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
