"""Figure 5: tangents on a cone (Section IV-C)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from multitangent_lab._looks import finish, label, look
from multitangent_lab.experiments._descents import Descent, descents, estimate_of
from multitangent_lab.experiments._experiment import Claim, Context, Experiment
from multitangent_lab.experiments._store import Cell, Row
from multitangent_lab.functions import FUNCTIONS, Function

_ANGLES = (15.0, 30.0, 45.0, 60.0, 75.0, 90.0)
_COUNTS = (4, 16, 64)
_ONES = Function("ones", lambda x: x.sum(-1), (0.0, 0.0))  # its gradient is (1, ..., 1)
_AT_ONCE = 100  # seeds


@dataclass(frozen=True)
class Cosine(Cell):
    """The cosine with the gradient over many seeds; without an angle for normal tangents."""

    dimension: int
    gradient: str
    num_tangents: int
    angle: float | None
    seeds: int


def cells(quick: bool, simulated: bool) -> list[Cosine | Descent]:
    """Both panels for every angle and K, and for normal tangents to compare with."""
    angles = (15.0, 60.0, 90.0) if quick else _ANGLES
    counts = (4, 16) if quick else _COUNTS
    n = 16 if quick else 64
    cases = [
        (gradient, count, angle)
        for angle in (None, *angles)
        for count in counts
        for gradient in ("mean", "projection")
    ]
    seeds, steps, per_decade = (50, 100, 2) if quick else (1000, None, 8)
    reported = 2 if quick else 5
    found: list[Cosine | Descent] = [
        Cosine(n, gradient, count, angle, seeds)
        for gradient, count, angle in [("single", 1, None), *cases]
    ]
    found += [
        Descent("styblinski-tang", n, gradient, count, angle, reported, per_decade, steps)
        for gradient, count, angle in [("backpropagation", 1, None), ("single", 1, None), *cases]
    ]
    return found


def run(cell: Cosine | Descent, context: Context) -> list[Row]:
    """One row a measure: the mean, and half the width of its 95 % confidence interval."""
    if isinstance(cell, Cosine):
        values, measure, rate = _cosines(cell), "cosine", None
    else:
        rows = descents(cell, {})
        values, measure = [row["value"] / cell.dimension for row in rows], "styblinski-tang"
        rate = rows[0]["learning_rate"]
    return [
        {
            "measure": measure,
            "dimension": cell.dimension,
            "gradient": cell.gradient,
            "num_tangents": cell.num_tangents,
            "angle": cell.angle,
            "learning_rate": rate,
            "seeds": len(values),
            "mean": fmean(values),
            "half_width": _half_width(values),
        }
    ]


def _half_width(values: list[float]) -> float:
    """Of the confidence interval of the mean, by Student's distribution."""
    if len(values) == 1:  # nothing random
        return 0.0
    quantile = float(student_t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / sqrt(len(values))


def _cosines(cell: Cosine) -> list[float]:
    estimate = estimate_of(cell.gradient, cell.num_tangents, cell.angle)
    found: list[float] = []
    for part in range(-(-cell.seeds // _AT_ONCE)):
        points = torch.zeros(1, _AT_ONCE, cell.dimension, dtype=torch.float64)
        estimates = estimate(_ONES, points, part)[0]  # [S, n]
        lengths = estimates.norm(dim=1) * sqrt(cell.dimension)
        found += (estimates.sum(1) / lengths).tolist()
    return found[: cell.seeds]


# By gradient, K and angle.
_Known = dict[tuple[str, int, float | None], Row]


def _known(rows: list[Row], measure: str) -> _Known:
    wanted = [row for row in rows if row["measure"] == measure]
    return {(row["gradient"], row["num_tangents"], row["angle"]): row for row in wanted}


def draw(rows: list[Row], folder: Path) -> None:
    """Cosine, and value reached, against the angle."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    n = rows[0]["dimension"]
    titles = {
        "cosine": f"Cosine similarity, n = {n}",
        "styblinski-tang": f"Styblinski-Tang, n = {n}: f(x)/n",
    }
    for axes, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        _panel(axes, _known(rows, measure))
        axes.set(title=title, xlabel="angle (degrees)")
        finish(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(folder / "fig5.png")


def _panel(axes: Axes, known: _Known) -> None:
    """Lines with confidence intervals for the cones; level lines for gradients without one."""
    for gradient, count in dict.fromkeys(key[:2] for key in known):
        style = look(gradient, count)
        cone = [known[gradient, count, a] for a in _ANGLES if (gradient, count, a) in known]
        if cone:
            angles, means = ([row[name] for row in cone] for name in ("angle", "mean"))
            axes.plot(angles, means, label=label(gradient, count), **style)
            low, high = ([row["mean"] + s * row["half_width"] for row in cone] for s in (-1, 1))
            axes.fill_between(angles, low, high, color=style["color"], alpha=0.15, lw=0)
        else:
            plain = {name: style[name] for name in ("color", "linestyle")}
            level = known[gradient, count, None]["mean"]
            axes.axhline(level, label=label(gradient, count), **plain)


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper says about Figure 5."""
    cosine, value = _known(rows, "cosine"), _known(rows, "styblinski-tang")
    return [
        _unaffected("the projection's cosine does not depend on the angle", cosine),
        _degrades(cosine),
        _unaffected("nor does the value it reaches on Styblinski-Tang", value),
        _reaches(value),
        _like_normal(value),
    ]


def _counts(known: _Known) -> list[int]:
    return sorted({k for name, k, angle in known if name == "projection" and angle is not None})


def _unaffected(statement: str, known: _Known) -> Claim:
    """The same draws are turned to every angle, so that only rounding may make a difference."""
    ranges = {}
    for count in _counts(known):
        means = [
            row["mean"]
            for (name, k, angle), row in known.items()
            if (name, k) == ("projection", count) and angle is not None
        ]
        ranges[count] = (max(means) - min(means)) / abs(means[0])
    shown = ", ".join(f"{value:.1g} for K = {count}" for count, value in ranges.items())
    return Claim(
        "IV-C",
        statement,
        max(ranges.values()) < 1e-4 if ranges else None,
        f"the same tangents, turned to every angle: relative differences {shown}",
    )


def _degrades(cosine: _Known) -> Claim:
    statement = (
        "the mean's cosine falls with the angle, until it is barely better than a single tangent's"
    )
    most = max(_counts(cosine), default=0)
    found = [cosine.get(("mean", most, angle)) for angle in (15.0, 60.0, 90.0)]
    single = cosine.get(("single", 1, None))
    if single is None or None in found:
        return Claim("IV-C", statement, None, "")
    narrow, middle, wide = (row["mean"] for row in found if row is not None)
    return Claim(
        "IV-C",
        statement,
        narrow < middle < wide and narrow < single["mean"] + 0.25 * (wide - single["mean"]),
        f"K = {most}: {wide:.3f} at 90 degrees, {middle:.3f} at 60, {narrow:.3f} at 15; single "
        f"tangent {single['mean']:.3f}",
    )


def _reaches(value: _Known) -> Claim:
    """The optimum counts as reached within 1 % of the minimum."""
    statement = (
        "the mean of 16 and 64 reaches Styblinski-Tang's optimum down to 60 degrees and degrades "
        "from 45 on"
    )
    minimum = FUNCTIONS["styblinski-tang"].minimum
    reached: dict[tuple[int, float], bool] = {}
    parts = []
    for count in (k for k in _counts(value) if k >= 16):
        found = {a: value["mean", count, a]["mean"] for a in _ANGLES if ("mean", count, a) in value}
        reached |= {(count, angle): mean < 0.99 * minimum for angle, mean in found.items()}
        shown = ", ".join(f"{mean:.1f} at {angle:.0f}" for angle, mean in found.items())
        parts.append(f"K = {count}: f/n {shown}")
    agrees = all(ok == (angle >= 60) for (_, angle), ok in reached.items())
    return Claim(
        "IV-C",
        statement,
        agrees if reached else None,
        f"{'; '.join(parts)}; minimum {minimum:.1f}",
    )


def _like_normal(value: _Known) -> Claim:
    found = {
        (name, count): abs(row["mean"] - value[name, count, None]["mean"])
        for (name, count, angle), row in value.items()
        if angle == 90.0 and (name, count, None) in value
    }
    return Claim(
        "IV-C",
        "at 90 degrees the result is comparable to that of normal tangents",
        max(found.values()) < 1.0 if found else None,
        f"f/n differs by at most {max(found.values(), default=0):.2g}",
    )


EXPERIMENT = Experiment(
    title="Figure 5: non-orthogonal tangents",
    cells=cells,
    run=run,
    draw=draw,
    claims=claims,
)
