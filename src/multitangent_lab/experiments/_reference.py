"""Good rates of the true gradient on closed-form functions, from which others are suggested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from multitangent.aggregation import Aggregator
from multitangent.learning_rate import suggest
from multitangent_lab.experiments._store import Cell, Row, Store
from multitangent_lab.functions import FUNCTIONS, Function, TrueGradient, descend


@dataclass(frozen=True)
class Reference(Cell):
    """The true gradient's rates on one function; `steps` of `None` are the paper's."""

    function: str
    dimension: int
    steps: int | None = None


def reference_rates(
    function: Function, dimension: int, steps: int | None = None
) -> tuple[float, float]:
    """The lowest and the fastest of the rates that are good for the true gradient.

    Good is a rate that comes as near to the least value of all rates as a millionth of the initial
    gap; the fastest is the first to be there.
    """
    rates = torch.logspace(-6, 0, 121, dtype=torch.float64)
    options: Any = {"seeds": 1, "steps": steps, "dtype": torch.float64}
    found = descend(function, dimension, TrueGradient(), rates, **options)
    near = float(found.best.min()) + 1e-6 * gap(function, dimension)
    again = descend(function, dimension, TrueGradient(), rates, target=near, **options)
    reached = again.reached[:, 0]
    good = reached >= 0
    fastest = torch.where(good, reached, torch.iinfo(torch.int64).max).argmin()
    return float(rates[good].min()), float(rates[fastest])


def gap(function: Function, dimension: int) -> float:
    """From the first value to the minimum."""
    return float(function(function.start_point(dimension))) - dimension * function.minimum


def suggested_rate(
    store: Store, where: Reference, num_tangents: int, aggregator: Aggregator
) -> tuple[float, float, float]:
    """The rate suggested from the true gradient's alone, and those: the lowest and the fastest.

    The lowest is the reference, the fastest over the lowest the headroom.
    """

    def find(cell: Reference) -> list[Row]:
        lowest, fastest = reference_rates(FUNCTIONS[cell.function], cell.dimension, cell.steps)
        return [{"lowest": lowest, "fastest": fastest}]

    (row,) = store.obtain(where, find)
    rate = suggest(
        row["lowest"],
        num_tangents=num_tangents,
        dimension=where.dimension,
        aggregator=aggregator,
        headroom=max(row["fastest"] / row["lowest"], 1.0),
    )
    return rate, row["lowest"], row["fastest"]
