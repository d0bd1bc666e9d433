"""How many trials samplers need on closed-form functions, beside the vectorised grid.

The value for every rate is computed once, on a grid far finer than any search; the samplers then
search in that table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import log10
from statistics import median
from typing import Literal

import optuna
import torch

from multitangent import Normal
from multitangent_lab.experiments._experiment import Context, Experiment
from multitangent_lab.experiments._reference import gap
from multitangent_lab.experiments._store import Cell, Row
from multitangent_lab.functions import FUNCTIONS, Estimate, descend
from multitangent_lab.search import grid
from multitangent_lab.training import AGGREGATORS


@dataclass(frozen=True)
class Problem(Cell):
    """Descent on one function with one gradient, whose learning rate is searched."""

    function: str
    dimension: int
    num_tangents: int
    aggregator: Literal["mean", "projection"]
    steps: int


PROBLEMS = (
    Problem("sphere", 64, 4, "mean", 1000),
    Problem("sphere", 1024, 1, "projection", 1000),
    Problem("styblinski-tang", 64, 4, "mean", 1000),
    Problem("styblinski-tang", 64, 4, "projection", 1000),
    Problem("rosenbrock", 64, 4, "mean", 3000),
    Problem("rosenbrock", 64, 4, "projection", 3000),
)
BUDGETS = (5, 10, 20, 40)
REPEATS = 20
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed, scramble=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
_LOW, _HIGH, _POINTS = 1e-6, 1.0, 241


def tabulated(problem: Problem) -> list[float]:
    """Excess over the least value, in parts of the initial gap, for rates of the fine grid."""
    function = FUNCTIONS[problem.function]
    descent = descend(
        function,
        problem.dimension,
        Estimate(Normal(problem.num_tangents), AGGREGATORS[problem.aggregator]),
        torch.tensor(grid(_LOW, _HIGH, _POINTS), dtype=torch.float64),
        steps=problem.steps,
    )
    means = descent.best.mean(1)
    values: list[float] = ((means - means.min()) / gap(function, problem.dimension)).tolist()
    return values


def excess(table: list[float], rate: float) -> float:
    """The tabulated value of the nearest rate."""
    place = (log10(rate) - log10(_LOW)) / (log10(_HIGH) - log10(_LOW)) * (_POINTS - 1)
    return table[round(place)]


def search(table: list[float], sampler: optuna.samplers.BaseSampler) -> list[float]:
    """The least excess after each trial."""
    study = optuna.create_study(sampler=sampler)
    best: list[float] = []
    for _ in range(max(BUDGETS)):
        trial = study.ask()
        value = excess(table, trial.suggest_float("rate", _LOW, _HIGH, log=True))
        study.tell(trial, value)
        best.append(min([value, *best[-1:]]))
    return best


def run(problem: Problem, context: Context) -> list[Row]:
    """Search with every sampler: the median excess after so many trials, beside a grid's."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = tabulated(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        of_sampler = {
            sampler: [search(table, make(seed)) for seed in range(REPEATS)]
            for sampler, make in SAMPLERS.items()
        }
    rows = []
    for budget in BUDGETS:
        row: Row = {
            "function": problem.function,
            "dimension": problem.dimension,
            "num_tangents": problem.num_tangents,
            "aggregator": problem.aggregator,
            "trials": budget,
            "grid": min(excess(table, rate) for rate in grid(_LOW, _HIGH, budget)),
        }
        for sampler, runs in of_sampler.items():
            row[sampler] = median(run[budget - 1] for run in runs)
        rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    return rows


EXPERIMENT = Experiment(
    title="Samplers of a search for learning rates",
    cells=lambda quick, simulated: PROBLEMS,
    run=run,
    draw=lambda rows, folder: None,  # the table says it all
)
