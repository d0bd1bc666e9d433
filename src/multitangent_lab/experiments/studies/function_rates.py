"""Learning rates on closed-form functions: searched, suggested, and set by the curvature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from multitangent import Normal
from multitangent.learning_rate import StepRule
from multitangent_lab.experiments._draw_rates import draw_rates
from multitangent_lab.experiments._experiment import Context, Experiment
from multitangent_lab.experiments._reference import Reference, gap, suggested_rate
from multitangent_lab.experiments._store import Cell, Row
from multitangent_lab.functions import FUNCTIONS, Estimate, descend
from multitangent_lab.training import AGGREGATORS

DIMENSIONS = (16, 64, 256, 1024)
TANGENTS = (1, 2, 4, 16)
SEEDS = 5
CLOSE = 0.05  # of the initial gap to the minimum: what counts as no worse


@dataclass(frozen=True)
class Case(Cell):
    """One function, dimension, number of tangents and aggregator."""

    function: str
    dimension: int
    num_tangents: int
    aggregator: str


def cases() -> Iterator[Case]:
    """All cases, quick functions first."""
    for function in ("sphere", "styblinski-tang", "rosenbrock"):
        for dimension in DIMENSIONS:
            for count in TANGENTS:
                for aggregator in ("mean", "projection"):
                    yield Case(function, dimension, count, aggregator)


def run(case: Case, context: Context) -> list[Row]:
    """Search, suggestion and self-set rate of one case, as one row of the table."""
    function, n = FUNCTIONS[case.function], case.dimension
    aggregator = AGGREGATORS[case.aggregator]
    estimate = Estimate(Normal(case.num_tangents), aggregator)
    suggested, lowest, fastest = suggested_rate(
        context.store, Reference(case.function, n), case.num_tangents, aggregator
    )
    # Around the suggestion, which is one of them; Rosenbrock's 25 000 steps take their time.
    long = function.steps > 10_000
    below, above, decade = (5, 10, 4) if long else (20, 10, 8)
    rates = suggested * 10 ** (torch.arange(-below, above + 1, dtype=torch.float64) / decade)
    found = descend(function, n, estimate, rates, seeds=SEEDS)
    means = found.best.mean(1)
    best = int(means.argmin())
    own = float(means[below])
    selfset = None  # not run
    if not long or (case.num_tangents in (1, 16) and n <= 64):
        selfset = float(descend(function, n, estimate, StepRule(), seeds=SEEDS).best.mean())
    allowed = float(means[best]) + CLOSE * gap(function, n)
    row = {
        **asdict(case),
        "reference_rate": lowest,
        "reference_fastest": fastest,
        "suggested_rate": suggested,
        "searched_rate": float(rates[best]),
        "initial_gap": gap(function, n),
        "value_suggested": own,
        "value_searched": float(means[best]),
        "value_self_set": selfset,
        "suggested_is_no_worse": own <= allowed,
        "self_set_is_no_worse": None if selfset is None else selfset <= allowed,
    }
    return [row]


def draw(rows: list[Row], folder: Path) -> None:
    """Suggested rates against searched ones."""
    draw_rates(rows, "function", folder / "function-rates.png")


EXPERIMENT = Experiment(
    title="Learning rates on closed-form functions",
    cells=lambda quick, simulated: list(cases()),
    run=run,
    draw=draw,
)
