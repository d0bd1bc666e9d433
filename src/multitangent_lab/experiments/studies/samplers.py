"""How many trials samplers need on closed-form functions, beside the vectorised grid.

Run as ``python -m multitangent_lab.experiments.studies.samplers FOLDER``.

The value for every rate is computed once, on a grid far finer than any search; the samplers then
search in that table.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Callable
from math import log10
from pathlib import Path

import optuna
import torch

from multitangent import Mean, Normal, Projection
from multitangent_lab._files import write_csv, write_text
from multitangent_lab._provenance import provenance
from multitangent_lab.experiments._reference import gap
from multitangent_lab.functions import FUNCTIONS, Estimate, descend
from multitangent_lab.search import grid

# Function, dimension, tangents, aggregator, steps.
PROBLEMS = (
    ("sphere", 64, 4, Mean(), 1000),
    ("sphere", 1024, 1, Projection(), 1000),
    ("styblinski-tang", 64, 4, Mean(), 1000),
    ("styblinski-tang", 64, 4, Projection(), 1000),
    ("rosenbrock", 64, 4, Mean(), 3000),
    ("rosenbrock", 64, 4, Projection(), 3000),
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


def tabulated(problem: tuple[str, int, int, Mean | Projection, int]) -> list[float]:
    """Excess over the least value, in parts of the initial gap, for rates of the fine grid."""
    name, dimension, count, aggregator, steps = problem
    function = FUNCTIONS[name]
    found = descend(
        function,
        dimension,
        Estimate(Normal(count), aggregator),
        torch.tensor(grid(_LOW, _HIGH, _POINTS), dtype=torch.float64),
        steps=steps,
    )
    means = found.best.mean(1)
    values: list[float] = ((means - means.min()) / gap(function, dimension)).tolist()
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


def main(folder: Path) -> None:
    """Search with every sampler and write the table of median excesses."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    rows = []
    for problem in PROBLEMS:
        table = tabulated(problem)
        name, dimension, count, aggregator, _ = problem
        of_sampler = {
            sampler: [search(table, make(seed)) for seed in range(REPEATS)]
            for sampler, make in SAMPLERS.items()
        }
        for budget in BUDGETS:
            row: dict[str, object] = {
                "function": name,
                "dimension": dimension,
                "num_tangents": count,
                "aggregator": type(aggregator).__name__.lower(),
                "trials": budget,
                "grid": min(excess(table, rate) for rate in grid(_LOW, _HIGH, budget)),
            }
            for sampler, runs in of_sampler.items():
                row[sampler] = statistics.median(run[budget - 1] for run in runs)
            rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
            print(rows[-1], flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "samplers.csv", rows)
    write_text(folder / "samplers.json", json.dumps(provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
