"""Figure 6: fully-connected networks on MNIST (Section IV-D)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from pandas import DataFrame

from multitangent_lab._files import write_csv
from multitangent_lab._looks import GRADIENTS, finish, label, look
from multitangent_lab.config import GradientName
from multitangent_lab.experiments._experiment import Claim, Experiment
from multitangent_lab.experiments._store import Row
from multitangent_lab.experiments._training import (
    MOST_TELLING,
    Training,
    mean_test_errors,
    results,
    run,
    training,
)


def cells(quick: bool, simulated: bool) -> list[Training]:
    """Width 256 in full, then one seed of the other widths, then the other seeds."""
    if quick:
        return [
            training("fc", "digits", gradient, count, 0, width=64, epochs=3, simulated=simulated)
            for gradient, count in MOST_TELLING
        ]
    wide = (1024, 4096)
    order: list[tuple[int, Sequence[tuple[GradientName, int]], Sequence[int]]] = [
        (256, MOST_TELLING, (0, 1, 2)),
        *((width, MOST_TELLING[:3], (0,)) for width in wide),
        *((width, MOST_TELLING[3:], (0,)) for width in wide),
        *((width, MOST_TELLING, (1, 2)) for width in wide),
    ]
    return [
        training("fc", "mnist", gradient, count, seed, width=width, simulated=simulated)
        for width, gradients, seeds in order
        for seed in seeds
        for gradient, count in gradients
    ]


def draw(rows: list[Row], folder: Path) -> None:
    """Test error against the width, and loss curves of the widest network that was trained."""
    write_csv(folder / "results.csv", results(rows))
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    if any(row["simulated"] for row in rows):
        figure.suptitle("simulated with backpropagation")
    left, right = figure.subplots(1, 2)
    _errors(left, rows)
    _curves(right, [row for row in rows if row["width"] == max(r["width"] for r in rows)])
    for axes in (left, right):
        finish(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(folder / "fig6.png")


def _errors(axes: Axes, rows: list[Row]) -> None:
    errors = mean_test_errors(rows, "width")
    widths = sorted({row["width"] for row in rows})
    for gradient, count in GRADIENTS:
        known = [width for width in widths if (width, gradient, count) in errors]
        values = [errors[width, gradient, count] for width in known]
        axes.plot(known, values, label=label(gradient, count), **look(gradient, count))
    axes.set(title="Test error (%)", xlabel="width", xscale="log", yscale="log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curves(axes: Axes, rows: list[Row]) -> None:
    """Means over the seeds that are still in training."""
    table = DataFrame(rows)
    for gradient, count in GRADIENTS:
        own = table[(table["gradient"] == gradient) & (table["num_tangents"] == count)]
        means = own.groupby("epoch")["validation_loss"].mean()
        style = look(gradient, count) | {"marker": "", "linewidth": 1}
        axes.plot(means.index, means, **style)
    axes.set(title=f"Validation loss, width {rows[0]['width']}", xlabel="epoch", yscale="log")


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper says about Figure 6, for every width of which all gradients were run."""
    errors = mean_test_errors(rows, "width")
    widths = sorted({row["width"] for row in rows})
    complete = [w for w in widths if all((w, *gradient) in errors for gradient in GRADIENTS)]
    forward = GRADIENTS[1:]
    return [
        *(_more_is_better(errors, width, width in complete) for width in widths),
        *(_close(errors, width, width in complete) for width in widths),
        *(_little_difference(errors, width, width in complete) for width in widths),
        *(_epochs(rows, width, width in complete) for width in widths),
        _wider(errors, GRADIENTS[:1], "the true gradient is more accurate in wider networks"),
        _wider(errors, forward, "forward gradients can lose accuracy as the width grows"),
    ]


_Errors = dict[tuple[Any, ...], float]


def _more_is_better(errors: _Errors, width: int, complete: bool) -> Claim:
    known = {key[1:]: error for key, error in errors.items() if key[0] == width}
    agrees = complete and all(
        known[gradient, 16] < known[gradient, 4] < known[gradient, 2]
        for gradient in ("mean", "projection")
    )
    shown = ", ".join(f"{g} {k}: {known[g, k]:.2f} %" for g, k in GRADIENTS if (g, k) in known)
    statement = f"width {width}: more tangents clearly improve the result"
    return Claim("IV-D", statement, agrees if complete else None, shown)


def _close(errors: _Errors, width: int, complete: bool) -> Claim:
    """Close is within one point of the test error."""
    statement = f"width {width}: K = 16 comes close to the true gradient"
    if not complete:
        return Claim("IV-D", statement, None, "")
    away = [errors[width, name, 16] - errors[width, "backpropagation", 1] for name in _MANY]
    shown = f"{away[0]:.2f} (mean) and {away[1]:.2f} (projection) points of test error away"
    return Claim("IV-D", statement, max(away) < 1, shown)


_MANY = ("mean", "projection")


def _little_difference(errors: _Errors, width: int, complete: bool) -> Claim:
    """Little is at most a point of the test error."""
    statement = f"width {width}: little practical difference between mean and projection"
    if not complete:
        return Claim("IV-D", statement, None, "")
    apart = {k: errors[width, "mean", k] - errors[width, "projection", k] for k in (2, 4, 16)}
    shown = ", ".join(f"{value:.2f} (K = {count})" for count, value in apart.items())
    agrees = max(map(abs, apart.values())) < 1
    return Claim("IV-D", statement, agrees, f"the mean's test error is larger by {shown} points")


def _wider(errors: _Errors, gradients: Sequence[tuple[str, int]], statement: str) -> Claim:
    """From the narrowest to the widest: the true gradient gains, some forward gradient loses."""
    widths = sorted({key[0] for key in errors if all((key[0], *g) in errors for g in gradients)})
    if len(widths) < 2:
        return Claim("IV-D", statement, None, "")
    narrow, wide = widths[0], widths[-1]
    changes = {f"{g} {k}": errors[wide, g, k] - errors[narrow, g, k] for g, k in gradients}
    shown = ", ".join(f"{name}: {change:+.2f}" for name, change in changes.items())
    gains = max(changes.values()) < 0
    agrees = gains if len(gradients) == 1 else not gains
    return Claim("IV-D", statement, agrees, f"points from width {narrow} to {wide}: {shown}")


def _epochs(rows: list[Row], width: int, complete: bool) -> Claim:
    """The paper says it of width 4096."""
    statement = (
        f"width {width}: all forward gradients need significantly more epochs than the true "
        "gradient, which converges within 25"
    )
    if not complete:
        return Claim("IV-D", statement, None, "")
    best: dict[bool, list[int]] = {True: [], False: []}
    for row in results(rows):
        if row["width"] == width:
            best[row["gradient"] == "backpropagation"].append(row["best_epoch"])
    exact, forward = best[True], best[False]
    return Claim(
        "IV-D",
        statement,
        max(exact) <= 25 and min(forward) > 1.5 * max(exact),
        f"best epoch: {min(exact)} to {max(exact)} with the true gradient, {min(forward)} to "
        f"{max(forward)} with forward gradients",
    )


EXPERIMENT = Experiment(
    title="Figure 6: fully-connected networks",
    cells=cells,
    run=run,
    draw=draw,
    claims=claims,
)
