"""Earlier gradients among the tangents of descent on figure 4's functions, at equal K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from multitangent_lab._files import write_csv
from multitangent_lab.experiments._descents import Descent, descents
from multitangent_lab.experiments._experiment import Experiment
from multitangent_lab.experiments._store import Row
from multitangent_lab.functions import FUNCTIONS

GRADIENTS = ("projection", "previous", "running mean")  # the first without guesses
COUNTS = (2, 4, 16)
STEPS = {"sphere": None, "styblinski-tang": None, "rosenbrock": 5000}
DIMENSIONS = (16, 64, 256)


def cells() -> Iterator[Descent]:
    """Every function, dimension, K and gradient."""
    for function, steps in STEPS.items():
        for dimension in DIMENSIONS:
            for count in COUNTS:
                for gradient in GRADIENTS:
                    yield Descent(function, dimension, gradient, count, per_decade=4, steps=steps)


def left(rows: Sequence[Row]) -> Row:
    """What a case leaves of the gap between the start and the minimum, as the mean of its seeds."""
    first = rows[0]
    function, n = FUNCTIONS[first["function"]], first["dimension"]
    initial, minimum = float(function(function.start_point(n))), n * function.minimum
    names = ("function", "dimension", "num_tangents", "gradient", "learning_rate")
    shares = [(row["value"] - minimum) / (initial - minimum) for row in rows]
    return {name: first[name] for name in names} | {
        "left": float(f"{fmean(shares):.4g}"),
        "least": float(f"{min(shares):.4g}"),
        "most": float(f"{max(shares):.4g}"),
    }


def draw(rows: list[Row], folder: Path) -> None:
    """The table of what each case leaves."""
    columns = ("function", "dimension", "num_tangents", "gradient")
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in columns), []).append(row)
    write_csv(folder / "summary.csv", [left(of_case) for of_case in cases.values()])


EXPERIMENT = Experiment(
    title="Running means of gradients among the tangents",
    cells=lambda quick, simulated: list(cells()),
    run=lambda cell, context: descents(cell, {}),
    draw=draw,
)
