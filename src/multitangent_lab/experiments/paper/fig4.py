"""Figure 4: closed-form functions minimised with every gradient (Section IV-B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from multitangent_lab._files import write_csv
from multitangent_lab._looks import GRADIENTS, finish, label, look
from multitangent_lab.experiments._descents import Descent, descents
from multitangent_lab.experiments._experiment import Claim, Context, Experiment
from multitangent_lab.experiments._published_rates import published_rate
from multitangent_lab.experiments._reference import Reference, suggested_rate
from multitangent_lab.experiments._store import Row
from multitangent_lab.functions import FUNCTIONS

_FUNCTIONS = ("sphere", "styblinski-tang", "rosenbrock")
_KINDS = ("searched", "suggested", "published")
_LEAST = 1e-12  # smaller values are drawn there
_SOLVED = 1e-6  # of the initial gap: too little to be improved on


def cells(quick: bool, simulated: bool) -> list[Descent]:
    """Every function, dimension and gradient; quick ones first."""
    dimensions = (1, 4, 16) if quick else tuple(2**i for i in range(11))
    return [
        Descent(
            function,
            dimension,
            gradient,
            count,
            seeds=2 if quick else 5,
            per_decade=2 if quick else 4 if function == "rosenbrock" else 8,
            steps=100 if quick else None,
        )
        for function in _FUNCTIONS
        for dimension in dimensions
        for gradient, count in GRADIENTS
    ]


def run(cell: Descent, context: Context) -> list[Row]:
    """The values reached at the searched, the suggested and the published rate."""
    further = {
        "published": published_rate(cell.function, cell.dimension, cell.gradient, cell.num_tangents)
    }
    if cell.gradient != "backpropagation":
        where = Reference(cell.function, cell.dimension, cell.steps)
        further["suggested"], *_ = suggested_rate(
            context.store, where, cell.num_tangents, cell.aggregator
        )
    function = FUNCTIONS[cell.function]
    ends = {
        "initial": float(function(function.start_point(cell.dimension))),
        "minimum": cell.dimension * function.minimum,
    }
    return [row | ends for row in descents(cell, further)]


def draw(rows: list[Row], folder: Path) -> None:
    """The best value against n, one row of panels for every kind of rate; and the rates."""
    write_csv(folder / "learning-rates.csv", _rates(rows))
    table = DataFrame(rows)
    table = table[table["initial"] > table["minimum"]]  # Rosenbrock of one variable is constant
    figure = Figure(figsize=(13, 10), dpi=130, layout="constrained")
    panels = figure.subplots(len(_KINDS), len(_FUNCTIONS), squeeze=False)
    for line, kind in zip(panels, _KINDS, strict=True):
        for axes, function in zip(line, _FUNCTIONS, strict=True):
            _panel(axes, table[table["function"] == function], kind)
            axes.set_title(f"{function}, {kind} rates")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(folder / "fig4.png")


def _panel(axes: Axes, table: DataFrame, kind: str) -> None:
    negative = (table["minimum"] < 0).any()
    for gradient, count in GRADIENTS:
        # Nothing is suggested for the true gradient: what the search found stands in its place.
        own = "searched" if gradient == "backpropagation" and kind == "suggested" else kind
        wanted = (table["gradient"] == gradient) & (table["num_tangents"] == count)
        means = table[wanted & (table["rate"] == own)].groupby("dimension")["value"].mean()
        values = means / means.index if negative else means.clip(_LEAST)
        axes.plot(means.index, values, label=label(gradient, count), **look(gradient, count))
    axes.set(xlabel="n", ylabel="f(x)/n" if negative else "f(x)")
    axes.set_xscale("log", base=2)
    if len(table) and not negative:
        axes.set_yscale("log")
    finish(axes)


def _rates(rows: list[Row]) -> list[Row]:
    """The rate of every kind for every case, empty where there is none."""
    rates: dict[tuple[Any, ...], Row] = {}
    names = ("function", "dimension", "gradient", "num_tangents")
    for row in rows:
        case = {name: row[name] for name in names}
        known = rates.setdefault(tuple(case.values()), case | dict.fromkeys(_KINDS))
        known[row["rate"]] = row["learning_rate"]
    return list(rates.values())


# {(function, n, gradient, K): the part of the initial gap to the minimum that each seed leaves}
_Left = Mapping[tuple[str, int, str, int], Sequence[float]]


def _left(rows: list[Row], kind: str) -> _Left:
    left: dict[tuple[str, int, str, int], list[float]] = {}
    for row in rows:
        gap = row["initial"] - row["minimum"]
        if row["rate"] == kind and gap > 0:  # Rosenbrock of one variable has none
            key = (row["function"], row["dimension"], row["gradient"], row["num_tangents"])
            left.setdefault(key, []).append((row["value"] - row["minimum"]) / gap)
    return left


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper says about Figure 4, looked at with searched rates.

    Better and worse is a result if all its seeds are better, or worse, than all seeds of the other:
    of five and five seeds that happens by chance in 0.8 % of the cases.
    """
    left = _left(rows, "searched")
    return [
        _struggles(left),
        _converges(left),
        *(_more_is_better(left, function) for function in ("sphere", "styblinski-tang")),
        _more_can_be_worse(left),
        *(_no_impact(left, function) for function in ("sphere", "styblinski-tang")),
        _notable(left),
        _suggestion(left, _left(rows, "suggested")),
    ]


def _struggles(left: _Left) -> Claim:
    """In the largest dimension; to struggle is to leave 1 % and more."""
    n = max(n for function, n, _, _ in left if function == "sphere")
    single, true = (fmean(left["sphere", n, g, 1]) for g in ("single", "backpropagation"))
    return Claim(
        "IV-B",
        "the single tangent struggles to optimise even the Sphere in many dimensions",
        single > 0.01 > true,
        f"n = {n}: {single:.2g} of the initial value is left, {true:.2g} with the true gradient",
    )


def _converges(left: _Left) -> Claim:
    """To the minimum is to leave less than 1 %."""
    found = {
        key: fmean(values)
        for key, values in left.items()
        if key[0] != "rosenbrock" and key[1] <= 16 and key[2] == "single"
    }
    worst = max(found, key=lambda key: found[key])
    return Claim(
        "IV-B",
        "on Sphere and Styblinski-Tang the single tangent converges to the minimum for n <= 16",
        found[worst] < 0.01,
        f"at most {found[worst]:.2g} of the initial gap is left ({worst[0]}, n = {worst[1]})",
    )


def _compared(values: Sequence[float], others: Sequence[float]) -> str:
    """Whether all seeds are better or worse than all others, what is solved being equal."""
    low, high = (max(end(values), _SOLVED) for end in (min, max))
    other_low, other_high = (max(end(others), _SOLVED) for end in (min, max))
    return "better" if high < other_low else "worse" if low > other_high else "equal"


# What is compared: a case, what its seeds leave, and what the seeds of the other leave.
_Pairs = list[tuple[str, Sequence[float], Sequence[float]]]


def _steps(left: _Left, function: str) -> _Pairs:
    """Each K with the next lower one."""
    found: _Pairs = []
    for (name, n, gradient, count), values in left.items():
        fewer = {2: ("single", 1), 4: (gradient, 2), 16: (gradient, 4)}.get(count)
        if name == function and fewer and (name, n, *fewer) in left:
            found.append((f"n = {n}, {gradient}, K = {count}", values, left[(name, n, *fewer)]))
    return found


def _judged(pairs: _Pairs) -> dict[str, list[str]]:
    """The cases that are better, equal and worse."""
    found: dict[str, list[str]] = {"better": [], "equal": [], "worse": []}
    for case, values, others in pairs:
        found[_compared(values, others)].append(case)
    return found


def _counts(found: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} in {len(cases)}" for name, cases in found.items())


def _more_is_better(left: _Left, function: str) -> Claim:
    found = _judged(_steps(left, function))
    return Claim(
        "IV-B",
        f"{function}: adding tangents consistently improves the result",
        bool(found["better"]) and not found["worse"],
        f"all seeds against all of the next lower K: {_counts(found)} cases",
    )


def _more_can_be_worse(left: _Left) -> Claim:
    pairs = _steps(left, "rosenbrock")
    found = _judged(pairs)
    higher = [
        case for case, values, before in pairs if fmean(values) > 2 * max(fmean(before), _SOLVED)
    ]
    return Claim(
        "IV-B",
        "rosenbrock: for small n and K, adding tangents can decrease performance",
        True if found["worse"] else None,
        f"all seeds against all of the next lower K: {_counts(found)} cases; in means over the "
        f"seeds higher in {'; '.join(higher) or 'none'}",
    )


def _no_impact(left: _Left, function: str) -> Claim:
    """None is less than 5 % of the initial gap."""
    apart = [
        abs(fmean(values) - fmean(left[name, n, "projection", count]))
        for (name, n, gradient, count), values in left.items()
        if name == function and gradient == "mean"
    ]
    return Claim(
        "IV-B",
        f"{function}: mean or projection has no impact on the final result",
        max(apart) < 0.05,
        f"they differ by at most {max(apart):.2g} of the initial gap",
    )


def _notable(left: _Left) -> Claim:
    """Two cases or more, none to the contrary: of thirty that happens by chance in 1 of 100."""
    found = _judged(
        [
            (f"n = {n}, K = {count}", left[name, n, "projection", count], values)
            for (name, n, gradient, count), values in left.items()
            if name == "rosenbrock" and gradient == "mean"
        ]
    )
    shown = "; ".join(found["better"])
    return Claim(
        "IV-B",
        "rosenbrock: the projection improves notably over the mean",
        len(found["better"]) >= 2 and not found["worse"],
        f"all seeds against all: {_counts(found)} cases; better: {shown or 'none'}",
    )


def _suggestion(left: _Left, suggested: _Left) -> Claim:
    close = [
        fmean(values) <= fmean(left[case]) + 0.05
        for case, values in suggested.items()
        if case in left
    ]
    return Claim(
        None,
        "a rate suggested from the true gradient's is no worse (5 % of the initial gap) in 80 %",
        sum(close) >= 0.8 * len(close),
        f"in {sum(close)} of {len(close)} cases",
    )


EXPERIMENT = Experiment(
    title="Figure 4: closed-form functions",
    cells=cells,
    run=run,
    draw=draw,
    claims=claims,
)
