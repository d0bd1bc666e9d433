"""Descent on a closed-form function with one gradient, at the rate that a search has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent import Normal, Projection
from multitangent.aggregation import Aggregator
from multitangent.tangents import Cone, RunningMean
from multitangent_lab.experiments._store import Cell, Row
from multitangent_lab.functions import FUNCTIONS, Estimate, TrueGradient, descend
from multitangent_lab.training import AGGREGATORS


@dataclass(frozen=True)
class Descent(Cell):
    """Descent with one gradient, at all rates of a grid.

    Args:
        function: The function's name.
        dimension: n.
        gradient: `"backpropagation"`, `"single"`, `"mean"`, `"projection"`; or, for a projection
            with a guess among the K tangents, `"previous"` for the last forward gradient and
            `"running mean"` for the running mean of all.
        num_tangents: K; 1 for backpropagation.
        angle: Of the tangents' cone; `None` for normal tangents.
        seeds: How many seeds are reported. As many others choose the rate.
        per_decade: Rates of the grid per decade, from 1e-6 to 1.
        steps: Steps at most; `None` for the paper's.
    """

    function: str
    dimension: int
    gradient: str
    num_tangents: int
    angle: float | None = None
    seeds: int = 5
    per_decade: int = 8
    steps: int | None = None

    @property
    def aggregator(self) -> Aggregator:
        """How directional derivatives are combined."""
        return AGGREGATORS[self.gradient]


_DECAYS = {"previous": 0.0, "running mean": 0.9}


def estimate_of(gradient: str, num_tangents: int, angle: float | None = None) -> Estimate:
    """The estimate of that name, with tangents on a cone if there is an angle."""
    if gradient in _DECAYS:
        guess = RunningMean(decay=_DECAYS[gradient])
        return Estimate(Normal(num_tangents - 1) + guess, Projection())
    source = Normal(num_tangents) if angle is None else Cone(num_tangents, angle)
    return Estimate(source, AGGREGATORS[gradient])


def descents(cell: Descent, further: Mapping[str, float | None]) -> list[Row]:
    """The value that each seed reaches at the searched rate, and at further ones.

    The rate is the one with the least mean value over seeds that are not reported, so that the
    reported values are not the best of many by chance.

    Args:
        cell: What is run.
        further: Rates by the name of their kind.
    """
    count = 6 * cell.per_decade + 1
    grid = torch.logspace(-6, 0, count, dtype=torch.float64)
    others = {kind: rate for kind, rate in further.items() if rate is not None}
    rates = torch.cat([grid, torch.tensor(list(others.values()), dtype=torch.float64)])
    own = 1 if cell.gradient == "backpropagation" else cell.seeds  # the true gradient is not random
    values, steps = _reached(cell, rates, own if own == 1 else 2 * own)
    chosen = int(values[:count, -own:].mean(1).argmin())
    places = {"searched": chosen, **{kind: count + i for i, kind in enumerate(others)}}
    return [
        {
            "function": cell.function,
            "dimension": cell.dimension,
            "gradient": cell.gradient,
            "num_tangents": cell.num_tangents,
            "rate": kind,
            "learning_rate": float(f"{rates[place].item():.4g}"),
            "seed": seed,
            "value": values[place, seed].item(),
            "steps": int(steps[place, seed]),
        }
        for kind, place in places.items()
        for seed in range(own)
    ]


def _reached(cell: Descent, rates: Tensor, seeds: int) -> tuple[Tensor, Tensor]:
    gradient = (
        TrueGradient()
        if cell.gradient == "backpropagation"
        else estimate_of(cell.gradient, cell.num_tangents, cell.angle)
    )
    function = FUNCTIONS[cell.function]
    found = descend(function, cell.dimension, gradient, rates, seeds=seeds, steps=cell.steps)
    return found.best, found.steps
